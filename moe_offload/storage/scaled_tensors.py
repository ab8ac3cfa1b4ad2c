"""Quantized tensors of a safetensors folder: codes and their scales, two tensors in the file, made one.

Two methods: gpt-oss's MXFP4 (``X_blocks`` (E, rows, cols / 32, 16) and ``X_scales``) and fine-grained
FP8 (``X`` and ``X_scale_inv``, one scale for 128 x 128 codes). Reading puts both together into blocks
(csrc/io/relayout.h); nothing is dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import FP8_BLOCK, Relayout
from moe_offload.storage.safetensors import SafetensorsFolder, SafetensorsTensor, Scales

MXFP4_BLOCK = 32
METHODS = ("mxfp4", "fp8")
_FP8_RELAYOUTS = {"F32": Relayout.FP8_F32, "BF16": Relayout.FP8_BF16}


def quantization_method(config: Mapping[str, Any], where: str) -> str | None:
    """Return "mxfp4", "fp8" or None for floats.

    Raises:
        CheckpointError: any other method, or one of these on a shape that is not read.
    """
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is None and isinstance(config.get("quantization"), Mapping):
        quantization = "mlx"  # which names no method
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if isinstance(quantization, Mapping) and {"load_in_4bit", "load_in_8bit"} & quantization.keys():
        method = "bitsandbytes"  # its first configurations did not name it
    remedy = "use the unquantized (bf16) checkpoint or a GGUF file of the model"
    if method not in METHODS or not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{where}: the weights are quantized with {method!r:.80}, which is not supported; from "
            f"safetensors F32, F16, BF16, gpt-oss's mxfp4 and fine-grained fp8 are: {remedy}"
        )
    if method == "mxfp4" and config.get("model_type") != "gpt_oss":
        raise CheckpointError(
            f"{where}: mxfp4 is read for gpt_oss only, not for {config.get('model_type')!r:.80}: {remedy}"
        )
    block = quantization.get("weight_block_size")
    if method == "fp8" and (not isinstance(block, (list, tuple)) or list(block) != [FP8_BLOCK, FP8_BLOCK]):
        raise CheckpointError(
            f"{where}: fp8 is read with one scale for {FP8_BLOCK} x {FP8_BLOCK} weights, but "
            f"weight_block_size is {block!r:.80}: {remedy}"
        )
    return str(method)


def pair_scales(folder: SafetensorsFolder, method: str | None) -> SafetensorsFolder:
    """Return the folder with each quantized tensor holding its scales.

    Raises:
        CheckpointError: codes without scales, scales without codes, or shapes that do not fit.
    """
    if method is None:
        return folder
    pairing = _Pairing(folder)
    for tensor in folder.tensors.values():
        if method == "mxfp4" and tensor.name.endswith("_blocks"):
            pairing.mxfp4(tensor)
        elif method == "fp8" and tensor.dtype == "F8_E4M3":
            pairing.fp8(tensor)
    return pairing.result()


class _Pairing:
    def __init__(self, folder: SafetensorsFolder) -> None:
        self.folder, self.left = folder, dict(folder.tensors)

    def mxfp4(self, blocks: SafetensorsTensor) -> None:
        name = blocks.name.removesuffix("_blocks")
        scales = self.take_scales(blocks, f"{name}_scales", ("U8",))
        *outer, num_blocks, num_bytes = blocks.shape if len(blocks.shape) == 4 else (0, 0, 0, 0)
        if blocks.dtype != "U8" or num_bytes != MXFP4_BLOCK // 2:
            self.fail(blocks, f"must be U8 of shape (experts, rows, blocks, {MXFP4_BLOCK // 2})")
        if scales.shape != blocks.shape[:-1]:
            self.fail(scales, f"has shape {scales.shape}, its blocks want {blocks.shape[:-1]}")
        del self.left[blocks.name]
        shape = (*outer, num_blocks * MXFP4_BLOCK)
        self.left[name] = replace(
            blocks, name=name, dtype="MXFP4", shape=shape, scales=Scales(Relayout.MXFP4, scales.span)
        )

    def fp8(self, codes: SafetensorsTensor) -> None:
        scales = self.take_scales(codes, f"{codes.name}_scale_inv", tuple(_FP8_RELAYOUTS))
        if len(codes.shape) < 2 or codes.shape[-1] % FP8_BLOCK:
            self.fail(codes, f"has shape {codes.shape}; columns must be a multiple of {FP8_BLOCK}")
        *outer, rows, cols = codes.shape
        wanted = (*outer, -(-rows // FP8_BLOCK), cols // FP8_BLOCK)
        if scales.shape != wanted:
            self.fail(scales, f"has shape {scales.shape}, its codes of shape {codes.shape} want {wanted}")
        self.left[codes.name] = replace(codes, scales=Scales(_FP8_RELAYOUTS[scales.dtype], scales.span))

    def take_scales(self, codes: SafetensorsTensor, name: str, dtypes: tuple[str, ...]) -> SafetensorsTensor:
        scales = self.left.pop(name, None)
        if scales is None:
            self.fail(codes, f"has no scales: {name!r} is missing; fetch the missing shard")
        if scales.dtype not in dtypes:
            self.fail(scales, f"has dtype {scales.dtype}; scales must be {' or '.join(dtypes)}")
        return scales

    def result(self) -> SafetensorsFolder:
        for name, tensor in self.left.items():
            if name.endswith("_scale_inv"):
                self.fail(tensor, "belongs to no F8_E4M3 tensor; fetch the missing shard")
        return SafetensorsFolder(self.folder.files, self.left)

    def fail(self, tensor: SafetensorsTensor, message: str) -> NoReturn:
        raise CheckpointError(f"{self.folder.files[tensor.span.file_id]}: tensor {tensor.name!r} {message}")
