"""docs/FAMILIES.md says what is: every family of transformers is tried again."""

from __future__ import annotations

import pytest
from walk_families import DOCUMENT, document_with, walk

from moe_offload.storage.families import MOE_FAMILIES, MOE_FAMILIES_BY_TRIAL


@pytest.mark.slow
def test_the_document_lists_what_passes_and_why_the_others_do_not():
    trials = walk()
    passed = {trial.model_type for trial in trials if trial.passed}
    assert passed == {*MOE_FAMILIES, *MOE_FAMILIES_BY_TRIAL}
    assert DOCUMENT.read_text(encoding="utf-8") == document_with(trials)
