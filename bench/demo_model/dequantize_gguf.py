"""Write a GGUF's weights as F32: the same model for programs that must not quantize activations.

    python bench/demo_model/dequantize_gguf.py IN.gguf OUT.gguf

Two programs that quantize activations to 8 bits part at near-ties: a last-digit difference becomes a
whole step. On F32 weights neither does, so there the tokens of both must be equal.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

HEADER_FIELDS = ("GGUF.", "general.architecture")  # written by the writer itself


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    dequantize_gguf(args.source, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


def dequantize_gguf(source: Path, out: Path) -> Path:
    """Copy metadata, write every tensor as F32, return ``out``; one tensor at a time is in memory."""
    reader = GGUFReader(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".unfinished")
    writer = GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        num_bytes = 4 * int(tensor.n_elements)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.close()
    os.replace(unfinished, out)
    return out


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if not field.name.startswith(HEADER_FIELDS):
            element_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element_type)


if __name__ == "__main__":
    main()
