"""Instruction set by name, threads, forks, signals and how many cores are worth using."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from op_cases import LINEAR_CASES, LinearCase
from op_helpers import assert_same_bits, restore_isa_and_threads  # noqa: F401
from torch import Tensor

from moe_offload import _native, ops
from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import GgmlType, row_bytes

ISAS = _native.available_isas()

pytestmark = pytest.mark.usefixtures("restore_isa_and_threads")


def linear(case: LinearCase) -> Tensor:
    return ops.linear(case.x(), torch.from_numpy(case.weight()), case.ggml_type, case.rows, case.cols)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_unknown_isa_is_refused_by_name() -> None:
    done = run_python("from moe_offload import _native; _native.isa()", MOE_OFFLOAD_ISA="mmx")
    assert "ConfigError: MOE_OFFLOAD_ISA=mmx is not one of the instruction sets" in done.stderr
    assert f"offers: {', '.join(ISAS)}" in done.stderr


def test_the_isa_named_in_the_environment_is_used() -> None:
    done = run_python("from moe_offload import _native; print(_native.isa())", MOE_OFFLOAD_ISA=ISAS[0])
    assert done.stdout.strip() == ISAS[0]


def test_a_forked_child_gets_an_error_and_exits() -> None:
    done = run_python("""
        import os, sys, torch
        from moe_offload import ops
        from moe_offload.errors import ConfigError
        from moe_offload.storage.expert_format import GgmlType
        def op():
            return ops.linear(torch.ones(1, 8), torch.zeros(32, dtype=torch.uint8), GgmlType.F32, 1, 8)
        ops.set_num_threads(2)
        op()
        if pid := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        try:
            op()
        except ConfigError as error:
            sys.exit(7 if "use the spawn start method" in str(error) else 1)
    """)
    assert done.returncode == 7, done.stderr


def test_ctrl_c_stops_a_long_op_within_a_second() -> None:
    x = torch.zeros(4096, 4096)
    weight = torch.zeros(4096 * row_bytes(GgmlType.IQ2_XS, 4096), dtype=torch.uint8)
    ops.set_num_threads(2)
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            ops.linear(x, weight, GgmlType.IQ2_XS, 4096, 4096)
    timer.join()
    assert time.monotonic() - sent[0] < 1.0
    assert_same_bits(linear(LINEAR_CASES[0]), linear(LINEAR_CASES[0]))  # the pool works on


def test_ctrl_c_stops_waiting_for_another_threads_op() -> None:
    weight = torch.zeros(2048 * row_bytes(GgmlType.IQ2_XS, 4096), dtype=torch.uint8)
    x = torch.zeros(2048, 4096)
    ended: list[float] = []

    def hold_the_pool() -> None:
        for _ in range(2):
            ops.linear(x, weight, GgmlType.IQ2_XS, 2048, 4096)
        ended.append(time.monotonic())

    ops.set_num_threads(1)
    holder = threading.Thread(target=hold_the_pool)
    holder.start()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while not ended:
            ops.linear(x[:1], weight, GgmlType.IQ2_XS, 2048, 4096)
    interrupted = time.monotonic()
    timer.join()
    holder.join()
    assert interrupted < ended[0]


def test_the_caller_is_one_of_the_threads_and_the_others_sleep_when_idle() -> None:
    done = run_python("""
        import os, time, torch
        from moe_offload import ops
        from moe_offload.storage.expert_format import GgmlType
        x, weight = torch.ones(1, 256), torch.zeros(4096 * 1024, dtype=torch.uint8)
        before = len(os.listdir("/proc/self/task"))
        ops.set_num_threads(4)
        ops.linear(x, weight, GgmlType.F32, 4096, 256)
        print(len(os.listdir("/proc/self/task")) - before)
        start = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - start)
    """)
    workers, idle_cpu_s = done.stdout.split()
    assert int(workers) == 3
    assert float(idle_cpu_s) < 0.1, "a worker that spins all the time would take 0.5"


def test_ops_of_several_threads_take_turns() -> None:
    case = LINEAR_CASES[3]
    expected, results = linear(case), [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = linear(case)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("num_threads", [3, 9])
def test_threads_that_get_no_core_leave_no_chunk_behind(num_threads: int) -> None:
    """More threads than cores and than chunks: whoever runs takes over what the others have not begun."""
    for rows in (40, 1000):
        case = LinearCase(GgmlType.Q4_0, 1, rows, 512)
        ops.set_num_threads(1)
        expected = linear(case)
        ops.set_num_threads(num_threads)
        for _ in range(50):
            assert_same_bits(linear(case), expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "40000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "120000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
    ],
)
def test_usable_cores_respect_cgroup_quotas(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _native.usable_cores(str(tmp_path)) == (expected or len(os.sched_getaffinity(0)))


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu in os.sched_getaffinity(0):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-255")
    assert _native.usable_cores(str(tmp_path)) == 1


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_threads must be at least 1, got 0"):
        ops.set_num_threads(0)
