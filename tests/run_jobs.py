"""Started by torchrun in tests: runs several commands in the same processes, one after another.

python run_jobs.py JOBS: a JSON list of {command, settings}. A run that fails leaves OUT.error.RANK.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from moce.commands.registry import COMMANDS
from moce.runtime.launch import launch

for job in json.loads(Path(sys.argv[1]).read_text()):
    try:
        COMMANDS[job["command"]].run(job["settings"])
    except Exception:
        note = Path(f"{job['settings']['out']}.error.{launch().rank}")
        note.write_text(traceback.format_exc())
