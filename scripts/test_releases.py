"""`make test-releases`: the tests that meet other libraries, with the oldest releases that are supported.

    python scripts/test_releases.py [PART OF A LABEL...]

A release is installed, alone, into a folder that comes before the environment's own packages. The tests of every run
print their last line; the newest releases are what `make test` runs with.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# (what is installed, the tests that meet it). Of Quantus 0.6 and torchcam 0.5 the releases before do not do: those of
# Quantus do not run on NumPy 2.4, torchcam's have neither the metric nor the LeGrad that are replaced.
RUNS: list[tuple[list[str], list[str]]] = [
    (
        ["open_clip_torch==3.0.0"],
        ["tests/models/test_towers.py", "tests/models/test_load.py", "tests/models/test_matrix.py"],
    ),
    (
        ["transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"],
        ["tests/models/test_hf.py", "tests/models/test_hf_text.py", "tests/models/test_words.py"],
    ),
    (["captum==0.8.0"], ["tests/compat/test_captum.py", "tests/compat/test_accelerate.py"]),
    (["grad-cam==1.5.4"], ["tests/compat/test_grad_cam.py", "tests/compat/test_accelerate.py"]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", nargs="*", help="parts of what is installed; all by default")
    wanted = parser.parse_args().labels
    failed = []
    for packages, tests in RUNS:
        label = ", ".join(packages)
        if wanted and not any(part in label for part in wanted):
            continue
        with tempfile.TemporaryDirectory(prefix="clipfast-release-") as folder:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages]
            subprocess.run(install, check=True)
            there = [test for test in tests if (ROOT / test).exists()]
            environment = {**os.environ, "PYTHONPATH": folder}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *there]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        print(f"{label}: {lines[-1] if lines else done.stderr[-500:]}", flush=True)
        if done.returncode:
            failed.append(label)
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  ")))[:4000], flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all releases pass")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
