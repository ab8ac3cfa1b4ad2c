"""Write tests/golden/ops.npz: arithmetic v1 of every type, by the plain numpy oracle.

Run it only to add types: what is in the file already must not change.
Usage: python tests/make_golden_ops.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import reference
from op_cases import activations, packed_weight

from moe_offload.expert_ops import ActivationKind
from moe_offload.storage.expert_format import BLOCK_SIZES, FLOAT_TYPES, GgmlType

GOLDEN = Path(__file__).parent / "golden" / "ops.npz"


def cols_of(ggml_type: GgmlType) -> int:
    """Return few columns: at least two turns of the chains for floats, odd block counts elsewhere."""
    elements = BLOCK_SIZES[ggml_type].elements
    return 45 if ggml_type in FLOAT_TYPES else {32: 320, 64: 320, 256: 512}[elements]


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for ggml_type in GgmlType:
        cols, name = cols_of(ggml_type), ggml_type.name
        packed = packed_weight(ggml_type, 3, cols, seed=100 + ggml_type)
        x = activations(2, cols, seed=200 + ggml_type).numpy()
        arrays |= {f"{name}/packed": packed, f"{name}/x": x, f"{name}/y": reference.linear(x, packed, name)}
    gate = np.concatenate([np.linspace(-20, 20, 201), [-104, -87, 88, 100]]).astype(np.float32)
    up = np.linspace(-8, 9, len(gate)).astype(np.float32)
    arrays |= {"activation/gate": gate, "activation/up": up}
    # + 0: the projection through which the test reads an activation knows no -0.
    arrays |= {
        f"activation/{kind.name}": reference.activate(kind.name, gate, up) + 0 for kind in ActivationKind
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
