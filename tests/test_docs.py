"""The snippets of the documentation and the examples run as they are written."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from taco import vllm_alias

ROOT = Path(__file__).parents[1]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # not reachable from every machine: the packaged file stands in for it

pytestmark = pytest.mark.real_model


@pytest.fixture(autouse=True)
def alias_ends_with_the_page():
    yield
    vllm_alias.uninstall()


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/guided_decoding.md"])
def test_snippets_run_in_order(page, smollm2_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.4")  # GiB: 8192 tokens in float32
    names: dict[str, object] = {}
    assert any(HUB_ID in code for code in snippets(page))
    for code in snippets(page):
        exec(compile(code.replace(HUB_ID, str(smollm2_path)), page, "exec", dont_inherit=True), names)
    names["llm"].close()
    assert "Paris" in capsys.readouterr().out or page != "README.md"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(path, smollm2_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), str(smollm2_path)])
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out) > 20


def test_the_api_reference_is_that_of_the_docstrings():
    render = runpy.run_path(str(ROOT / "docs" / "build_api.py"))["render"]
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == render(), "run `make docs`"


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
