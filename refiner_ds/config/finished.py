"""Whether a run has been trained to its end, as far as its run folder tells: no data is looked at."""

from __future__ import annotations

from refiner_ds.config.reading import RunFile
from refiner_ds.config.sections import forbidden_change
from refiner_ds.run_folder import RunFolder


def is_finished(run: RunFile) -> bool:
    """Whether the run folder of a run file holds this run, and it has trained as many epochs as the file asks for."""
    folder, epochs = RunFolder(run.folder), run.refiner.recipe.all_epochs
    summary = folder.reached()
    if summary is None:
        return False
    trained = summary.get("epochs", epochs)  # absent: the key is younger than the run
    if not isinstance(trained, int | float) or trained < epochs:
        return False
    before = folder.resolved()
    return before is None or forbidden_change(before, run.resolved()) is None
