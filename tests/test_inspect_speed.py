"""`moe-offload inspect` says which formats have slow kernels, and whether the decode step is native."""

import re

import pytest
from toy_models import save_toy_model

from moe_offload import _native, cli_inspect, ops
from moe_offload.config import DEMO_MODEL
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import FAST_TYPES, GgmlType


def report_of(path):
    return cli_inspect.describe(open_checkpoint(path), 100)


@pytest.mark.skipif(_native.isa() == "baseline", reason="without vector instructions only floats are fast")
def test_the_fast_types_are_those_that_the_native_table_has_kernels_of_their_own_for():
    assert {kind for kind in GgmlType if ops.has_fast_kernel(kind)} == FAST_TYPES


def test_the_demo_model_is_fast_and_decodes_natively():
    report = report_of(DEMO_MODEL)
    assert report["native_decode_step"] and report["native_decode_step_reason"] is None
    assert report["generic_kernel_formats"] == ([] if _native.isa() != "baseline" else ["Q4_0", "F16"])
    text = cli_inspect.as_text(report)
    assert re.search(r"^decode step +native$", text, re.MULTILINE)
    assert re.search(rf"^Q4_0 .* {'fast' if _native.isa() != 'baseline' else 'generic'}", text, re.MULTILINE)


def test_a_family_without_a_native_step_says_why(tmp_path):
    save_toy_model("deepseek_v2", tmp_path)
    report = report_of(tmp_path)
    assert not report["native_decode_step"]
    text = cli_inspect.as_text(report)
    assert "decode step      transformers' layers: the native decode step does not know" in text


def test_a_format_without_kernels_of_its_own_is_named(monkeypatch):
    monkeypatch.setattr(cli_inspect, "FAST_TYPES", FAST_TYPES - {GgmlType.F16})
    report = report_of(DEMO_MODEL)
    assert "F16" in report["generic_kernel_formats"]
    assert re.search(r"^F16 .*  generic: right, but slower$", cli_inspect.as_text(report), re.MULTILINE)
