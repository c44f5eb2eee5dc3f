"""Kernels that are forked from a server: like those that are started afresh, and gone when they should be."""

import os
import signal
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from iclgd_helpers.errors import CellError
from iclgd_helpers.experiments import warm_kernels
from iclgd_helpers.experiments.notebook_execution import Execution

pytestmark = pytest.mark.skipif(not warm_kernels.forks(), reason="nothing is forked on this system")

IMPORTS = ["import numpy as np", "import pandas as pd", "import torch", "import matplotlib.pyplot as plt"]
FACTS = """
import os, random, signal, sys
print(os.getcwd(), [argument for argument in sys.argv if "kernel.json" not in argument], sys.path, sys.executable)
print(os.environ["ICLGD_RECORDS"], torch.get_num_threads(), plt.get_backend(), __name__, sys.stdin.fileno())
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])
print(os.getpgid(0) == os.getsid(0) == os.getpid(), os.getppid() == int(os.environ["JPY_PARENT_PID"]))
print(pd.DataFrame([[0.5] * 40]))
print(sorted(name for name in os.environ if name not in ("ICLGD_PROGRESS", "PAGER")))
"""
DRAWN = "import random\nprint(random.random(), np.random.random(), torch.rand(1).item())"
WAS = "import sys\nprint('sched' in sys.modules)"


@pytest.fixture(scope="module")
def server():
    server = warm_kernels.Server([*IMPORTS, "import sched", "print('said')", "import no_such_module", "1 / 0"])
    yield server
    server.end()


def printed(tmp_path, source, server=None, **environment):
    cells = [new_code_cell(text) for text in ("\n".join(IMPORTS), source)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "page.ipynb")
    Execution(tmp_path / "page.ipynb", tmp_path / "out.ipynb", {}, server, environment).run()
    cell = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1]
    return "".join(output.text for output in cell.outputs)


def test_a_forked_kernel_is_like_one_that_was_started(tmp_path, monkeypatch, server):
    monkeypatch.setenv("ICLGD_RECORDS", "set after the server began")
    warm = printed(tmp_path, FACTS, server, OMP_NUM_THREADS="2")
    assert "server began 2 " in warm
    assert warm == printed(tmp_path, FACTS, OMP_NUM_THREADS="2")
    assert printed(tmp_path, WAS, server) == "True\n", "it was forked"
    assert printed(tmp_path, WAS) == "False\n", "control: the other was not"


def test_each_kernel_draws_its_own_numbers(tmp_path, server):
    first, second = (printed(tmp_path, DRAWN, server).split() for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize(("end", "known"), [
    ("import os; os._exit(3)", "ended with exit status 3"), ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
])  # fmt: skip
def test_of_a_dead_kernel_what_is_known_is_said(end, known, tmp_path, server):
    with pytest.raises(CellError, match=known):
        printed(tmp_path, end, server)


def test_what_a_kernel_has_started_ends_with_it(tmp_path, server):
    source = "import subprocess\nprint(subprocess.Popen(['sleep', '300']).pid)"
    pid = int(printed(tmp_path, source, server))
    time.sleep(0.2)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_without_its_server_a_kernel_is_started(tmp_path):
    lost = warm_kernels.Server([])
    lost.process.kill()
    lost.process.wait()
    assert printed(tmp_path, "print('afresh')", lost) == "afresh\n"
    lost.end()


def test_a_server_that_imports_ends_at_once_and_its_kernels_end_with_it():
    slow = warm_kernels.Server(["import time\ntime.sleep(100)"])
    began = time.monotonic()
    slow.end()
    assert time.monotonic() - began < 5 and slow.process.returncode is not None
    server = warm_kernels.Server([])
    kernel = server.fork([sys.argv[0], "-f", "/nonexistent/kernel.json"], dict(os.environ), "/")
    assert kernel is not None and os.getpgid(kernel.pid) == kernel.pid, "a group of its own, from the first moment"
    server.end()
    time.sleep(0.2)
    assert not psutil.pid_exists(kernel.pid) or psutil.Process(kernel.pid).status() == "zombie"
    assert kernel.poll() in (warm_kernels.LOST, -signal.SIGKILL)


def test_imports_are_those_of_the_cells(tmp_path):
    cells = [
        new_code_cell("import a, b as c\nfrom d import (\n    e,\n)\nif x:\n    import f"),
        new_code_cell("%magic\nimport g"),
        new_code_cell("import a, b as c"),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), tmp_path / "page.ipynb")
    assert warm_kernels.imports_of([tmp_path / "page.ipynb"]) == ["import a, b as c", "from d import e"]
