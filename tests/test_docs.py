"""What the documentation shows runs and does what it says, its links lead somewhere, and docstrings are complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import INFORMED, assert_merged, data, logits, perturb_, tiny, tokens
from lorafamily import cli, errors, registry
from lorafamily.allocation.run import Run
from lorafamily.layers import kinds
from lorafamily.layers.placement import placement_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str = "python") -> list[str]:
    """The page's code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run_page(page: str, scope: dict) -> dict:
    """Execute a page's blocks in one namespace; a traceback names the page and the block."""
    for number, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page}, block {number}", "exec"), scope)
    return scope


def test_the_method_in_one_file(monkeypatch):
    """README: a start from singular vectors."""
    (code,) = [code for code in blocks("README.md") if code.startswith("from dataclasses")]
    scope: dict = {}
    exec(code, scope)
    installed = lorafamily.methods()
    monkeypatch.setattr(registry, "methods", lambda: installed | {"pissa": scope["pissa"]})
    model = tiny()
    base = logits(model)
    lorafamily.apply(model, "pissa+alora", rank=3, rounds=2)
    assert torch.equal(logits(model), base)
    adapter = placement_of(model).adapters["blocks.0.mlp.up"]
    U, V = adapter.update.factors()
    truncated = torch.linalg.svd(model.blocks[0].mlp.up.weight)
    best = truncated.U[:, :3] * truncated.S[:3] @ truncated.Vh[:3]
    assert_close(U @ V, best, rtol=1e-4, atol=1e-5)  # float32 SVD
    lorafamily.train(model, data(), steps=40, validation=data(1), progress=False)
    adapted = logits(perturb_(model))
    assert_merged(logits(lorafamily.merge(model)), adapted)


@pytest.mark.parametrize("method", ["alora", "lora"])
def test_the_script_prints_what_is_shown(method, monkeypatch, tmp_path, capsys):
    """README: ranks and parameters to the digit; the loss of the noise, 0.01, with ALoRA, and 0.5 with plain LoRA."""
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in blocks("README.md") if code.startswith("import copy")]
    code = code.replace('"alora"', f'"{method}"').replace("lorafamily.train(", "history = lorafamily.train(")
    scope: dict = {}
    with torch.random.fork_rng():
        exec(code, scope)

    def rows(text: str) -> list[list[str]]:
        return [line.split()[:-1] for line in text.splitlines() if line.startswith("layers")]

    loss = scope["history"].smoothed_loss()[-1]
    if method == "alora":
        (shown,) = blocks("README.md", "text")
        assert len(rows(shown)) == 4
        assert rows(capsys.readouterr().out) == rows(shown)
        assert loss == pytest.approx(0.01, abs=0.002)
    else:
        assert loss == pytest.approx(0.5, abs=0.05)
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()


def test_the_analysis_page(capsys):
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, seed=0))
    run_page("docs/analysis.md", {"model": model})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(placement_of(model).adapters)


class Defined(ModuleType):
    """A module of what has been defined so far."""

    def __init__(self, name: str, scope: dict):
        super().__init__(name)
        self.scope = scope

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.scope[name]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory) -> tuple[dict, list, dict[str, Callable[[], dict]]]:
    """What docs/extending.md defines, the kinds of layers then, its methods registered as its pyproject lines say."""
    (toml,) = blocks("docs/extending.md", "toml")
    points = tomllib.loads(toml)["project"]["entry-points"]
    scope: dict = {}

    def with_those_of_the_page(group: str, installed: dict) -> Callable[[], dict]:
        names = {name: value.rpartition(":")[2] for name, value in points[group].items()}
        return lambda: installed | {name: scope[at] for name, at in names.items() if at in scope}

    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("extending"))
        monkeypatch.setattr(kinds, "_KINDS", list(kinds._KINDS))
        for group, of in ((registry.GROUP, "methods"), (registry.SCORERS, "scorers")):
            found[of] = with_those_of_the_page(group, getattr(registry, of)())
            monkeypatch.setattr(registry, of, found[of])
        for package in ("my_package", "my_package.methods"):  # which the page's reader has by then
            monkeypatch.setitem(sys.modules, package, Defined(package, scope))
        run_page("docs/extending.md", scope)
        assert set(registry.methods()) > set(points[registry.GROUP])
        assert set(registry.scorers()) > set(points[registry.SCORERS])
        return scope, list(kinds._KINDS), found


@pytest.fixture
def extended(extensions, monkeypatch, tmp_path) -> dict:
    """What the page defines, while it is installed."""
    scope, known, registered = extensions
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "_KINDS", list(known))
    for of, installed in registered.items():
        monkeypatch.setattr(registry, of, installed)
    return scope


METHODS = [
    "orthorows",
    "rescaled",
    "vera",
    "cut",
    "small",
    "rescaled+alora",
    "cut+olora",
    "small+rslora",
    "orthorows+alora",
]


@pytest.mark.parametrize("method", [*METHODS, "adalora"])
def test_what_extending_defines_is_a_method_like_the_others(method, extended, tmp_path):
    options = {"scorer": "gate-gradient", "scorer_options": {"decay": 0.9}} if method == "adalora" else {}
    options |= {"rounds": 2} if "alora" in method.split("+") else {}
    model = tiny(dtype=torch.float64)
    base = logits(model)
    lorafamily.apply(model, method, rank=4, seed=0, **options)
    assert torch.equal(logits(model), base)
    history = lorafamily.train(model, data(), steps=24, lr=1e-2, validation=data(1), progress=False)
    assert history.steps[-1].loss < history.steps[0].loss
    adapters = placement_of(model).adapters
    for adapter in adapters.values():
        counted = type(adapter.update).count(adapter.update.d_in, adapter.update.d_out, **adapter.update.sizes())
        assert counted == adapter.trainable()
        whole = adapter.update.d_out if method.startswith(("rescaled", "vera")) else 0  # what has no slices
        assert adapter.slices * adapter.update.slice_cost + whole == counted
    adapted = logits(perturb_(model, size=0.2))
    assert (adapted - base).abs().max() > 0.1
    assert_close(logits(lorafamily.merge(model)), adapted)
    assert torch.equal(logits(lorafamily.unmerge(model)), adapted)
    folder = lorafamily.save(model, tmp_path / "saved")
    assert torch.equal(logits(lorafamily.load(tiny(dtype=torch.float64), folder)), adapted)
    assert torch.equal(logits(lorafamily.remove(model)), base)


def test_the_start_with_orthonormal_rows_has_them_for_every_parametrisation(extended):
    for method in ("orthorows", "orthorows+adalora", "orthorows+lora2"):
        model = lorafamily.apply(tiny(dtype=torch.float64), method, rank=3, seed=0, spread=2.0)
        for adapter in placement_of(model).adapters.values():
            _, V = adapter.factors()
            gram = V @ V.T
            assert_close(gram / gram[0, 0], torch.eye(3).double(), rtol=1e-5, atol=1e-5)  # drawn in float32
            if method == "orthorows":  # the others keep the rows' norms in their singular values
                assert gram[0, 0].item() == pytest.approx(4, rel=1e-5)


def test_the_start_from_data_has_its_directions_and_ranks(extended):
    evidence = lorafamily.gather(tiny(), "steepest", data(2))
    model = tiny()
    base = logits(model)
    lorafamily.apply(model, "steepest", budget=4_000, data=data(2), seed=0)
    assert torch.equal(logits(model), base)
    adapters = placement_of(model).adapters
    values = {name: torch.linalg.svdvals(of.gradient) for name, of in evidence.layers.items()}
    least = min(float(values[name][a.slices - 1]) for name, a in adapters.items() if a.slices)
    for name, adapter in adapters.items():
        # A slice that did not fit into the rest any more may be worth more than the last that did.
        assert int((values[name] > least).sum()) - adapter.slices in (0, 1, -1)
        _, V = adapter.factors()
        gradient = evidence.layers[name].gradient
        assert_close((gradient @ V.T).norm(dim=0), values[name][: adapter.slices], rtol=1e-4, atol=1e-5)
    assert len({adapter.slices for adapter in adapters.values()}) > 2
    with pytest.raises(lorafamily.MethodError, match='"steepest" looks at gradients before training'):
        lorafamily.apply(tiny(), "steepest", budget=4_000)


def test_cutting_once_keeps_the_highest_scores_and_the_budgets(extended):
    model = lorafamily.apply(tiny(), "cut", rank_budget=24, budget_at="end", seed=0)
    history = lorafamily.train(model, data(), steps=20, lr=1e-2, progress=False)
    (decision,) = history.decisions
    assert (decision.step, sum(decision.before.values()), decision.total) == (10, 48, 24)
    every = sorted((score for of in decision.scores.values() for score in of), reverse=True)
    for name, kept in decision.after.items():
        assert sum(score >= every[23] for score in decision.scores[name]) == kept
    assert all(adapter.slices == decision.after[name] for name, adapter in placement_of(model).adapters.items())
    assert len(set(decision.after.values())) > 1


def test_the_scorer_sums_the_squared_gradients_of_the_gates(extended):
    model = perturb_(lorafamily.apply(tiny(dtype=torch.float64), "lora", rank=3, seed=0))
    adapters = placement_of(model).adapters
    scorer = extended["GateGradient"](Run(model=model, adapters=adapters, steps=1))
    gates = {name: torch.ones(3, dtype=torch.float64, requires_grad=True) for name in adapters}
    with ExitStack() as gated:
        for name, adapter in adapters.items():
            gated.enter_context(adapter.gated(gates[name]))
        model(tokens()).loss.backward()
    scorer.observe()
    for name, found in scorer.scores().items():
        assert_close(found, gates[name].grad.square())


def test_the_penalty_is_the_size_of_the_updates(extended):
    for method in ("small", "small+olora"):
        model = perturb_(lorafamily.apply(tiny(dtype=torch.float64), method, rank=3, seed=0, size_cost=0.5))
        adapters = placement_of(model).adapters.values()
        expected = 0.5 * sum(adapter.delta().square().sum() for adapter in adapters) / len(adapters)
        assert_close(placement_of(model).method.penalty(adapters), expected)


def test_the_kind_of_layer_carries_every_method(extended):
    for method in sorted(lorafamily.methods().keys() - INFORMED):
        model = nn.Sequential(extended["Multiplied"](7, 5, c=0.5)).double().requires_grad_(False)
        extended["check"](method, model, torch.randn(3, 7, dtype=torch.float64), "kind")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename
def test_deployment_as_shown(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the page deploys a transformers model")
    pytest.importorskip("peft", reason="the page goes to peft and back")
    monkeypatch.chdir(tmp_path)
    with torch.enable_grad():
        scope = run_page("docs/deployment.md", {})
    model, ids = scope["model"], scope["ids"]

    def of(name: str | None) -> torch.Tensor:
        return lorafamily.switch(model, name)(ids).logits

    expected, base = of("default"), of(None)
    assert (expected - base).abs().max() > 0.1
    # float32 logits of size one, in sums of another order than the adapter's: some units of 1e-7.
    close = {"rtol": 1e-5, "atol": 1e-5}
    merged = transformers.LlamaForCausalLM.from_pretrained("merged")
    assert_close(merged(ids).logits, expected, **close)
    assert_close(scope["theirs"](ids).logits, expected, **close)
    assert_close(of("back"), expected, **close)
    assert torch.equal(scope["of_base"], base)
    assert_close(scope["routed"], torch.stack([expected[0], of("back")[1], base[2], expected[3]]), **close)
    assert {adapter.slices for adapter in placement_of(model, "default").adapters.values()} > {4}
    assert max(row.error for row in scope["report"]) < 0.1 + 1e-6  # the root of the 1 % of energy that may go

    served = json.loads(Path("for-servers/adapter_config.json").read_text())
    shown = json.loads("{" + blocks("docs/deployment.md", "json")[1] + "}")
    assert shown == {key: served[key] for key in shown}
    base_model = transformers.LlamaForCausalLM.from_pretrained("base")
    exported = json.loads(Path("for-peft/adapter_config.json").read_text())
    for key, pattern in re.findall(r'"(\w+_pattern)": \{(.*?), …\}', blocks("docs/deployment.md", "json")[0]):
        assert exported[key]
        for shown in json.loads("{" + pattern + "}"):
            assert [at for at, _ in base_model.named_modules() if re.match(f"{shown}$", at)]

    # The fused model is tied, so its default merge must not touch the table; its parts must merge and export.
    gpt2 = scope["gpt2"]
    assert sorted({at.rpartition(".")[2] for at in placement_of(gpt2).adapters}) == ["q", "v"]
    perturb_(gpt2, size=0.2)
    adapted = gpt2(ids).logits
    assert_close(lorafamily.merge(gpt2)(ids).logits, adapted, **close)

    # What the consoles show, by the same commands; where ranks went, norms and what follows from them are those of the
    # machine it was written on.
    ran = []
    for console in blocks("docs/deployment.md", "console"):
        for command, output in re.findall(r"^\$ lorafamily (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE):
            cli.main(command.split())
            printed = [on_any_machine(line) for line in "".join(capsys.readouterr()).splitlines()]
            assert [line for line in output.splitlines() if line != "…" and on_any_machine(line) not in printed] == []
            ran.append(command.split()[0])
    assert ran == ["merge", "merge", "inspect", "export", "compress", "compress"]
    assert Path("merged-on-disk/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


def test_the_numbers_of_the_methods_page():
    """Counts by our own rule, from the shapes; AdaLoRA's schedule as printed."""
    page = re.sub(r"\s+", " ", (ROOT / "docs/methods.md").read_text())
    six = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    methods = lorafamily.methods()

    def count(method: str, shapes: list[tuple[int, int]], rank: int) -> int:
        return sum(methods[method].count(d_in, d_out, rank) for d_in, d_out in shapes)

    for k, printed_there in ((8, "1.33M"), (2, "0.33M"), (1, "0.17M")):
        assert f"| $k = {k}$ | {count('lora2', six * 12, k):,} | {printed_there} |" in page
    for said in (
        f"rank 12 on the six matrices is {count('adalora', six * 12, 12):,}, rank 8 is",
        f"rank 8 is {count('adalora', six * 12, 8):,}.",
        f"with {count('lora', six * 12, 1):,} parameters on the six matrices",
    ):
        assert said in page
    for name, rank, matrices, width, blocks_of in (
        ("RoBERTa-base, q v, 8", 8, 2, 768, 12),
        ("RoBERTa-large, q v, 8", 8, 2, 1024, 24),
        ("DeBERTa-XXL, q v, 16", 16, 2, 1536, 48),
        ("GPT-2 medium, q v, 4", 4, 2, 1024, 24),
        ("GPT-2 large, q v, 4", 4, 2, 1280, 36),
        ("GPT-3, q v, 1", 1, 2, 12288, 96),
        ("GPT-3, q v, 8", 8, 2, 12288, 96),
        ("GPT-3, q v, 4, or q k v o, 2", 4, 2, 12288, 96),
        ("GPT-3, q v, 4, or q k v o, 2", 2, 4, 12288, 96),
        ("GPT-3, q v, 64", 64, 2, 12288, 96),
    ):
        assert f"| {name} | {count('lora', [(width, width)] * blocks_of * matrices, rank):,} |" in page
    deberta = count("lora", [(1536, 1536)] * 48 * 2, 8)
    assert f"DeBERTa-XXL at the printed rank 8 would have {deberta:,};" in page

    def scored(method: str, shapes: list[tuple[int, int]]) -> int:
        made = methods[method]
        with torch.device("meta"):
            width = {made.parametrisation.sized_by: 8, **made.parametrisation_options}
            updates = [made.parametrisation(i, o, **width) for i, o in shapes]
        return sum(p.numel() for update in updates for p, _ in update.sliced())

    for shapes, share in ((six, "99.3"), ([(768, 768)], "98.9")):
        ours, theirs = scored("lora2", shapes), scored("adalora", shapes)
        assert f"{ours:,} against {theirs:,}, {share} %" in page
        assert f"{100 * (1 - ours / theirs):.1f}" == share

    def printed(t: int) -> float:
        return 576 + (864 - 576) * (1 - (t - 8_000 - 50_000) / (85_900 - 8_000 - 50_000)) ** 3

    assert f"864 → 576 it is {printed(8_000):,.0f} at $t_i$ and {printed(85_900 - 50_000):,.0f} before it jumps" in page


MEASURED = [
    r" → \d+(?= )",  # of a module's rank: where it went; a module that stayed shows its start alone
    r"(?<= ) [\d.e-]+$",  # ‖ΔW‖, the last column
    r"[\d,]+(?= adapter parameters)",
    r"\d+(?= slices → total rank )",
    r"(?<= slices → total rank )\d+",
    r"\d+(?= KiB)",
    r"[\d.]+% \(model\.\S+\)$",
    r"(?<=█ = )\d+$",
    r"[ ▁▂▃▄▅▆▇█]+$",
]


def on_any_machine(line: str) -> str:
    """A line of a console without what training to other ranks changes; names, shapes and settings stay."""
    for pattern in MEASURED:
        line = re.sub(pattern, "", line)
    return re.sub(r"\s+", " ", line).strip()


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: letters, marks, digits and _ stay, blanks become hyphens."""
    kept = (
        c
        for c in heading.strip().lower()
        if c in " -" or unicodedata.category(c)[:1] in "LM" or c.isdecimal() or c == "_"
    )
    return "".join(kept).replace(" ", "-")


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    text = without_code(page)
    named = re.findall(r'<a id="([^"]+)"></a>', text)
    assert len(set(named)) == len(named), "an anchor occurs twice"
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)} | set(named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"\w+:", target):  # an address elsewhere
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"\b((?:experiments|lorafamily|variants|tests|docs)/[\w./-]+\.(?:py|md|png))\b", page.read_text()
    )
    assert set(named) - {"tests/test_custom_models.py"} == {path for path in named if (ROOT / path).exists()}  # peft's


def test_the_site_builds_without_a_warning(tmp_path):
    """Reference and pages: a link or heading that is not there, or a page left out of the navigation, is a warning."""
    pytest.importorskip("mkdocstrings", reason="mkdocs and its plugins are the extra docs")
    pytest.importorskip("material", reason="the site's theme is in the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = "".join(page.read_text() for page in (tmp_path / "reference").glob("*.html"))
    assert [name for name in lorafamily.__all__ if f'id="lorafamily.{name}"' not in reference] == []
    methods = (tmp_path / "methods.html").read_text()
    assert methods.count("<math") > 50  # every formula is drawn
    assert "arithmatex" not in methods


def source_of(function: FunctionType) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def called_by(function: FunctionType) -> Iterator[FunctionType]:
    """The package's functions that a function calls by name."""
    for node in ast.walk(source_of(function)):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name):
                found = function.__globals__.get(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                module = function.__globals__.get(owner)
                found = getattr(module, name, None) if isinstance(module, ModuleType) else None
            case _:
                found = None
        if inspect.isfunction(found) and found.__module__.startswith("lorafamily"):
            yield inspect.unwrap(found)


def raises(function: FunctionType, seen: set[FunctionType] | None = None) -> set[str]:
    """Names of our errors that a function raises, itself or in what it calls by name."""
    seen = set() if seen is None else seen
    if function in seen:
        return set()
    seen.add(function)
    return raised_by(function).union(*(raises(other, seen) for other in called_by(function)))


def raised_by(function: FunctionType) -> set[str]:
    """Names of our errors in the function's own `raise` statements."""
    found = [node.exc for node in ast.walk(source_of(function)) if isinstance(node, ast.Raise)]
    names = {call.func.id for call in found if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return {name for name in names if hasattr(errors, name)}


# Raised deeper down, and ruled out before: the options are the package's own, and so are the reference's layers.
RULED_OUT = {("import_peft", "MethodError"), ("compress", "MethodError")}
RULED_OUT |= {("suggest_lr", name) for name in ("AllocationError", "BudgetError", "TargetError", "DataError")}


@pytest.mark.parametrize("name", lorafamily.__all__)
def test_everything_public_has_a_docstring_that_says_what_it_raises(name):
    thing = getattr(lorafamily, name)
    assert "__doc__" in vars(thing) or inspect.isfunction(thing)
    assert thing.__doc__, f"{name} has no docstring"
    if inspect.isfunction(thing):
        said = thing.__doc__.partition("Raises:")[2]
        missing = [e for e in sorted(raises(inspect.unwrap(thing))) if e not in said and (name, e) not in RULED_OUT]
        assert not missing, f"{name} raises {', '.join(missing)} and does not say so"
    elif inspect.isclass(thing):
        for own, member in vars(thing).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not own.startswith("_") and own != "extra_repr" and inspect.isfunction(function):
                assert function.__doc__, f"{name}.{own} has no docstring"


def test_functions_that_raise_say_so():
    """Also those that are not exported, where the error is raised in the function itself."""
    for module in every_module():
        for name, function in public_functions(module):
            assert function.__doc__ or "." in name, f"{module.__name__}.{name} has no docstring"
            said = (function.__doc__ or "").partition("Raises:")[2]
            missing = [error for error in raised_by(function) if error not in said]
            assert not missing, f"{module.__name__}.{name} raises {', '.join(missing)} and does not say so"


def public_functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Functions and methods that a module defines, by name in it."""
    own = [(name, thing) for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    for name, thing in own:
        members = vars(thing).items() if inspect.isclass(thing) else ()
        for inside, found in [(name, thing), *((f"{name}.{member}", value) for member, value in members)]:
            found = inspect.unwrap(found) if callable(found) else found
            if inspect.isfunction(found) and not any(part.startswith("_") for part in inside.split(".")):
                yield inside, found


def every_module() -> list[ModuleType]:
    """The package's modules, but for the command line, whose docstrings are its help."""
    names = [info.name for info in pkgutil.walk_packages(lorafamily.__path__, "lorafamily.")]
    return [importlib.import_module(name) for name in names if name != cli.__name__]
