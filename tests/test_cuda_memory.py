"""What of a card's memory may be taken: with a driver's answers, and where it gives none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_offload.config import parse_device
from moe_offload.cuda_memory import ASSUMED_CONTEXT_BYTES, CardMemory, card_memory
from moe_offload.errors import ConfigError, DeviceError
from moe_offload.residency import accelerator

MIB, GIB = 1 << 20, 1 << 30
# A card of 8 GiB; used grows by 300 MiB once there is a context. CUDA shows one card, which is NVML's second:
# as under CUDA_VISIBLE_DEVICES=1. The first one, of somebody else, draws a screen and is busy.
CUDA = """
#include <stdint.h>
#include <string.h>
int has_context = 0;
int moe_offload_cuda_pci_bus_id(int index, char* out, int size) {
    strncpy(out, "0000:41:00.0", size);
    return index == 0 ? BUS_ERROR : 101;
}
int moe_offload_cuda_memory(int index, int64_t* free_bytes, int64_t* total_bytes) {
    has_context = 1;
    *free_bytes = 7LL << 30, *total_bytes = 8LL << 30;
    return index == 0 ? 0 : 101;
}
"""
NVML = """
#include <string.h>
extern int has_context;
static const char* places[] = {"0000:01:00.0", "0000:41:00.0"};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* place, void** handle) {
    for (int i = 0; i < 2; ++i)
        if (strcmp(place, places[i]) == 0) return *handle = (void*)places[i], 0;
    return 6;
}
int nvmlDeviceGetMemoryInfo(void* handle, unsigned long long* memory) {
    static unsigned long long others = 0;
    memory[2] = handle == places[1] ? 700ULL << 20 : (others += 90ULL << 20);
    if (has_context && handle == places[1]) memory[2] += 300ULL << 20;
    return 0;
}
int nvmlDeviceGetDisplayActive(void* handle, int* active) {
    return *active = handle == places[1] ? DISPLAY : !DISPLAY, 0;
}
"""


def compiled(folder: Path, name: str, text: str, *flags: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    source, library = folder / f"{name}.c", folder / f"lib{name}.so"
    source.write_text(text)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), *flags, "-o", str(library)], check=True)
    return library


@pytest.mark.parametrize("display", [0, 1])
def test_the_context_is_measured_and_a_display_left_room(tmp_path: Path, display: int) -> None:
    library = compiled(tmp_path, "cuda", CUDA, "-DBUS_ERROR=0")
    nvml = compiled(tmp_path, "nvml", NVML, f"-DDISPLAY={display}", str(library), f"-Wl,-rpath,{tmp_path}")
    memory = card_memory(0, library, str(nvml))
    assert memory == CardMemory(8 * GIB, 7 * GIB, 300 * MIB, True, bool(display))
    assert memory.auto_bytes == 7 * GIB + 300 * MIB - (GIB if display else 256 * MIB)


def test_a_card_without_a_place_on_the_bus_is_not_taken_for_another(tmp_path: Path) -> None:
    library = compiled(tmp_path, "cuda", CUDA, "-DBUS_ERROR=1")
    nvml = compiled(tmp_path, "nvml", NVML, "-DDISPLAY=0", str(library), f"-Wl,-rpath,{tmp_path}")
    memory = card_memory(0, library, str(nvml))
    assert memory == CardMemory(8 * GIB, 7 * GIB, ASSUMED_CONTEXT_BYTES, False, True)


def test_without_management_the_context_is_assumed_and_a_display_too(tmp_path: Path) -> None:
    library = compiled(tmp_path, "cuda", CUDA, "-DBUS_ERROR=0")
    memory = card_memory(0, library, str(tmp_path / "none.so"))
    assert memory == CardMemory(8 * GIB, 7 * GIB, ASSUMED_CONTEXT_BYTES, False, True)


def test_a_card_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"GPU 3 does not say .*CUDA error 101"):
        card_memory(3, compiled(tmp_path, "cuda", CUDA, "-DBUS_ERROR=0"), "none.so")


def test_auto_takes_what_is_free_less_the_reserve_and_more_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def card(index: int) -> CardMemory:
        asked.append(index)
        return CardMemory(8 * GIB, 7 * GIB, 300 * MIB, is_measured=True, has_display=True)

    monkeypatch.setattr(accelerator, "card_memory", card)
    automatic = accelerator.memory_of(parse_device("cuda:1", "auto"))
    assert automatic == (6 * GIB + 300 * MIB, 300 * MIB) and asked == [1]
    assert accelerator.memory_of(parse_device("cuda", "6GiB")) == (6 * GIB, 300 * MIB) and asked[-1] == 0
    with pytest.raises(ConfigError, match=r'is more than cuda has: .* are free beside .* for vram="auto"'):
        accelerator.memory_of(parse_device("cuda", "7.5GiB"))
