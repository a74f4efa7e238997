"What the proofs counted, kept for docs/broken.md."

import json
from pathlib import Path

from reinpp.files import write_atomically
from reinpp.training.run_folder import locked

RESULTS = Path(__file__).with_name("results.json")


def note(**counts: dict) -> None:
    "Add to the results that are shown: what was tried -> {what is counted: number}."
    with locked(RESULTS.with_suffix(".lock"), patient=True):
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        write_atomically(RESULTS, (json.dumps(known | counts, indent=1, sort_keys=True) + "\n").encode())
