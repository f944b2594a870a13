"""`examples/quickstart.ipynb`, its cells run in order, as in a notebook that was started in `examples/`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
CELLS = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    """From the plan to the merged model; the notebook itself asserts that nothing else changed."""
    (tmp_path / "demo").symlink_to(EXAMPLES / "demo")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "of the model learns" in printed
    assert printed.count("loss on old text") == 3
    assert (tmp_path / "outputs" / "quickstart" / "adapter" / "adapter_model.safetensors").exists()
    points = {point.alpha: point for point in namespace["found"].points}
    assert points[1.0].speciality > points[0.0].speciality
    assert points[1.0].versatility < points[0.0].versatility
    with torch.no_grad():
        assert torch.isfinite(namespace["merged"](namespace["ids"]).logits).all()


def test_the_notebook_carries_no_output_and_its_links_lead_somewhere():
    links = 0
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
            assert (EXAMPLES / target).exists(), target
            links += 1
    assert links == 4
