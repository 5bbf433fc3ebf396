"""`import vllm` resolves to taco where a program asks for it, and nowhere else."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import get_args

import pytest

import taco
from taco import compat, vllm_alias
from taco.errors import TacoError, TacoValidationError

API = json.loads((Path(__file__).parent / "data" / "vllm_api_params.json").read_text())

Install = Callable[..., None]


@pytest.fixture
def install() -> Iterator[Install]:
    yield vllm_alias.install
    vllm_alias.uninstall()


@pytest.fixture
def real_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package of that name, installed for the time of a test."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = 'real'")
    (tmp_path / "vllm" / "only_there.py").write_text("")
    info = tmp_path / "vllm-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def run_program(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=cwd)


# Names


@pytest.mark.parametrize("module", vllm_alias._TABLE)
def test_every_name_of_the_table_is_an_object_of_taco(install: Install, module: str) -> None:
    install()
    for home, names in vllm_alias._TABLE[module].items():
        for entry in names.split():
            theirs, _, name = entry.partition("=")
            assert getattr(import_module(module), theirs) is getattr(import_module(home), name or theirs)


@pytest.mark.parametrize("version", API)
def test_the_top_level_exports_what_both_versions_export_from_the_modules_where_they_do(
    install: Install, version: str
) -> None:
    install(version)
    import vllm

    exports = API[version]["exports"]
    assert set(vllm.__all__) == exports.keys()
    for name in vllm.__all__:
        ours = getattr(vllm, name)
        there = getattr(import_module(exports[name]), name)
        assert there == ours if name.startswith("__") else there is ours
    namespace: dict[str, object] = {}
    exec("from vllm import *", namespace)
    assert namespace.keys() >= set(vllm.__all__)
    assert set(vllm.__all__) <= set(dir(vllm))


@pytest.mark.parametrize("version", API)
def test_each_class_has_its_path_in_each_version_whatever_version_is_shown(install: Install, version: str) -> None:
    other = next(name for name in API if name != version)
    install(other)
    modules = {entry["module"] for entry in API[version]["classes"].values()}
    assert len(modules & vllm_alias._TABLE.keys()) > 8
    for name, entry in API[version]["classes"].items():
        if entry["module"] in vllm_alias._TABLE and hasattr(taco, name):
            assert getattr(import_module(entry["module"]), name) is getattr(taco, name)


def test_objects_are_tacos_own(install: Install) -> None:
    install()
    import vllm
    import vllm.entrypoints.llm

    llm = object.__new__(taco.LLM)
    assert isinstance(llm, vllm.LLM) and vllm.entrypoints.llm.LLM is taco.LLM
    assert list(inspect.signature(vllm.LLM).parameters)[:3] == ["model", "tokenizer", "tokenizer_mode"]
    assert "temperature" in vllm.SamplingParams.__annotations__
    assert vllm.SamplingParams.__struct_fields__[0] == "n"
    assert issubclass(vllm.exceptions.VLLMValidationError, vllm.exceptions.VLLMError)
    assert not issubclass(vllm.exceptions.VLLMServerError, vllm.exceptions.VLLMClientError)
    assert issubclass(vllm.exceptions.ProfilerAlreadyActiveError, RuntimeError)
    assert issubclass(vllm.renderers.hf.ChatTemplateResolutionError, ValueError)


def test_types_for_annotations_are_those_of_what_taco_takes(install: Install) -> None:
    install()
    from vllm.entrypoints.chat_utils import ChatCompletionMessageParam, ConversationMessage
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, QuantizationMethods
    from vllm.transformers_utils.tokenizer import AnyTokenizer, MistralTokenizer

    assert MistralTokenizer in get_args(AnyTokenizer)
    assert ChatCompletionMessageParam is ConversationMessage
    assert list(get_args(QuantizationMethods)) == QUANTIZATION_METHODS == ["gguf"]


def test_submodules_are_attributes_without_an_import_of_their_own(install: Install) -> None:
    install()
    import vllm

    assert vllm.sampling_params.SamplingParams is taco.SamplingParams
    assert vllm.v1.engine.llm_engine is import_module("vllm.v1.engine.llm_engine")


@pytest.mark.parametrize(
    ("statement", "full_name"),
    [
        ("from vllm import Missing", "vllm.Missing"),
        ("from vllm.outputs import Missing", "vllm.outputs.Missing"),
        ("import vllm.missing", "vllm.missing"),
        ("import vllm.outputs.missing", "vllm.outputs.missing"),
        ("from vllm.missing.deep import Name", "vllm.missing"),
    ],
)
def test_an_import_of_something_absent_says_that_taco_does_not_have_it(
    install: Install, statement: str, full_name: str
) -> None:
    install("0.33")
    message = f"taco, which stands in for vllm 0.33.0 in this process, does not have {full_name}."
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(ModuleNotFoundError) as caught:
            exec(statement)
        assert str(caught.value) == message


def test_whether_something_absent_exists_can_be_asked(install: Install) -> None:
    install()
    assert importlib.util.find_spec("vllm.outputs") is not None
    for name in ("vllm.missing", "vllm.outputs.missing"):
        assert importlib.util.find_spec(name) is None


def test_a_module_can_be_imported_by_its_name_with_an_empty_from_list(install: Install) -> None:
    install()
    assert __import__("vllm.entrypoints.llm", fromlist=[""]).LLM is taco.LLM


def test_an_absent_attribute_is_an_attribute_error(install: Install) -> None:
    install()
    import vllm

    for owner in (vllm, vllm.outputs):
        with pytest.raises(AttributeError, match=rf"taco, .*does not have {owner.__name__}\.Missing\.$"):
            owner.Missing  # noqa: B018
        assert not hasattr(owner, "Missing")


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("vllm.entrypoints.openai.api_server", "run_server", "without a server"),
    ],
)
def test_what_taco_will_not_have_comes_with_the_reason(install: Install, module: str, name: str, reason: str) -> None:
    install()
    with pytest.raises(ImportError, match=reason):
        exec(f"from {module} import {name}")


def test_reasons_are_given_for_absent_names_only(install: Install) -> None:
    install()
    for full_name in vllm_alias._REASONS:
        parent, _, name = full_name.rpartition(".")
        assert full_name not in vllm_alias._TABLE
        assert parent not in vllm_alias._TABLE or not hasattr(import_module(parent), name)


# Version


@pytest.mark.parametrize(
    ("given", "shown", "parts", "behaviour"),
    [
        ("0.6", "0.6.6.post1", (0, 6, 6, "post1"), compat.V0_6),
        ("0.6.3", "0.6.3", (0, 6, 3), compat.V0_6),
        ("0.33", "0.33.0", (0, 33, 0), compat.V0_33),
    ],
)
def test_the_version_is_shown_and_chooses_the_behaviour(
    install: Install, given: str, shown: str, parts: tuple[int | str, ...], behaviour: compat.Behaviour
) -> None:
    install(given)
    import vllm

    assert vllm.__version__ == vllm.version.__version__ == metadata.version("vllm") == shown
    assert vllm.__version_tuple__ == vllm.version.__version_tuple__ == parts
    assert compat.behaviour_for() is behaviour
    vllm_alias.uninstall()
    assert compat.behaviour_for() is compat.V0_6


def test_the_default_version_is_0_6(install: Install) -> None:
    install()
    assert metadata.version("vllm") == "0.6.6.post1"


def test_the_metadata_is_that_of_a_distribution(install: Install) -> None:
    install("0.33")
    assert metadata.metadata("VLLM")["Name"] == "vllm"
    assert metadata.packages_distributions()["vllm"] == ["vllm"]
    assert metadata.version("pytest") == pytest.__version__
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and "taco" in str(spec.origin)


@pytest.mark.parametrize("version", ["0.9", "1.0", "", "0.60"])
def test_other_versions_are_refused_and_nothing_is_installed(install: Install, version: str) -> None:
    with pytest.raises(TacoValidationError, match="0.33"):
        install(version)
    assert importlib.util.find_spec("vllm") is None


def test_a_second_call_changes_nothing(install: Install) -> None:
    install("0.33")
    finders = sys.meta_path.copy()
    install("0.33.0")
    assert sys.meta_path == finders
    with pytest.raises(TacoError, match=r"stands in for already, and cannot become vllm 0\.6"):
        install("0.6")
    assert metadata.version("vllm") == "0.33.0"


def test_another_version_can_be_shown_than_the_one_that_holds(install: Install) -> None:
    install("0.33", "0.10.1")
    import vllm

    assert vllm.__version__ == metadata.version("vllm") == "0.10.1"
    assert vllm.__version_tuple__ == (0, 10, 1)
    assert compat.behaviour_for() is compat.V0_33
    install("0.33.0", shown_version="0.10.1")
    for other in (("0.33",), ("0.6", "0.10.1"), ("0.33", "0.10.2")):
        with pytest.raises(TacoError, match="stands in for already"):
            install(*other)


@pytest.mark.parametrize("version", ["", "new", "1", "0.10.1 or later"])
def test_what_is_shown_is_a_version(install: Install, version: str) -> None:
    with pytest.raises(TacoValidationError, match="is not a version of vLLM"):
        install("0.6", version)
    assert importlib.util.find_spec("vllm") is None


# Nothing leaks


def test_without_install_a_real_vllm_is_untouched(real_vllm: None) -> None:
    import vllm

    assert vllm.__version__ == "real"
    assert metadata.version("vllm") == "9.9"


def test_install_hides_a_real_vllm_and_uninstall_shows_it(real_vllm: None, install: Install) -> None:
    install()
    import vllm

    assert vllm.LLM is taco.LLM and metadata.version("vllm") == "0.6.6.post1"
    with pytest.raises(ImportError, match="taco"):
        import_module("vllm.only_there")
    vllm_alias.uninstall()
    assert import_module("vllm").__version__ == "real" and metadata.version("vllm") == "9.9"
    import_module("vllm.only_there")


def test_install_after_an_import_of_a_real_vllm_is_an_error(real_vllm: None, install: Install) -> None:
    import vllm

    with pytest.raises(TacoError, match=r"vllm was imported before .*install\(\)"):
        install()
    assert sys.modules["vllm"] is vllm and metadata.version("vllm") == "9.9"


def test_uninstall_leaves_no_module_and_no_finder(install: Install) -> None:
    before = sys.meta_path.copy()
    install()
    import vllm.outputs  # noqa: F401

    vllm_alias.uninstall()
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'vllm'"):
        import_module("vllm")
    vllm_alias.uninstall()  # without effect


def test_install_and_import_load_no_torch() -> None:
    code = (
        "import sys, taco.vllm_alias as alias; alias.install(); import vllm, vllm.sampling_params, vllm.outputs; "
        "vllm.SamplingParams(); vllm.RequestOutput; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Running programs

TACO_RUN = ("taco.entrypoints.cli.main", "run")
COMMANDS = [("taco.vllm",), TACO_RUN]
PROGRAM = """
import sys, vllm
if __name__ == "__main__":
    print([vllm.__version__, sys.argv, sys.path[0], __file__])
    if "fail" in sys.argv:
        vllm.SamplingParams(n=0)
    sys.exit(7)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_runs_with_its_own_arguments_and_folder(command: tuple[str, ...], program: Path) -> None:
    for options, shown in (([], "0.33.0"), (["--shown-version", "0.10.1"], "0.10.1")):
        result = run_program(*command, "--vllm-version", "0.33", *options, str(program), "--vllm-version", "1", "-m")
        argv = [str(program), "--vllm-version", "1", "-m"]
        assert eval(result.stdout) == [shown, argv, str(program.parent), str(program)]
        assert result.returncode == 7


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_script_comes_with_its_traceback(command: tuple[str, ...], program: Path) -> None:
    result = run_program(*command, str(program), "fail")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and f'File "{program}", line 6' in result.stderr
    assert "TacoValidationError: n must be at least 1" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_runs_with_its_own_arguments(command: tuple[str, ...], program: Path) -> None:
    result = run_program(*command, "-m", "program", "-c", cwd=program.parent)
    folder = str(program.parent)
    assert eval(result.stdout) == ["0.6.6.post1", [str(program), "-c"], folder, str(program)]
    assert result.returncode == 7


def test_a_module_that_a_package_misses_comes_with_the_traceback(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("import nomodule")
    (package / "program.py").touch()
    result = run_program("taco.vllm", "-m", "package.program", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "No module named 'nomodule'" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_runs_with_its_own_arguments(command: tuple[str, ...]) -> None:
    code = "import sys, vllm; print([vllm.__version__, sys.argv, sys.path[0], __name__, __import__('__main__').vllm])"
    result = run_program(*command, "-c", code, "x", "--y")
    assert result.stdout.startswith("['0.6.6.post1', ['-c', 'x', '--y'], '', '__main__', <module 'vllm'"), result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run"),
        (["no_such_file.py"], "There is no file 'no_such_file.py'"),
        (["-m", "nomodule"], "There is no module 'nomodule'."),
        (["-m", "nomodule.inner"], "There is no module 'nomodule.inner'."),
        (["-m", "json.nomodule"], "There is no module 'json.nomodule'."),
        (["-m", "json"], "'json' is a package without a __main__ module"),
        (["-m", "vllm.entrypoints.openai.api_server"], "an offline engine, without a server"),
        (["-m", "vllm.outputs"], "has no programs"),
        (["--vllm-version", "2", "-c", "0"], "0.33"),
    ],
)
def test_wrong_use_is_one_line(command: tuple[str, ...], arguments: list[str], message: str) -> None:
    result = run_program(*command, *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
