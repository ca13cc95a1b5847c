"""Each fault of conformance/mutants is caught, in the clause that it breaks; and none else is."""

import dataclasses
import functools
import os
import sys

import pytest

from conformance.mutants import (
    Mutant,
    MutantError,
    auto,
    fit_of_copy,
    golden_cases,
    load_mutants,
    mutated,
    report,
    rows,
    run_copy,
    try_mutant,
)
from conformance.mutants.command import MOST, jobs_of, rows_of
from conformance.mutants.engine import FIT, IMPLS, SLOW, cases_for, copied
from conformance.process import ROOT
from spec.goldens import Goldens

ALL = [mutant for impl in IMPLS for mutant in load_mutants(impl)]
MUTANTS = [mutant for mutant in ALL if mutant.impl not in SLOW]
CLAUSES = {f"S{number}" for number in (*range(1, 11), 13)}
LEAST = 110  # in each implementation
QUICK = ("S1", "S2", "S7")  # of the slow ones, the first of each is tried; nox has the rest
PAGE = ROOT / "docs" / "mutants.md"


@functools.cache
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several threads; and other tests share the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@functools.cache
def faultless(impl: str, dtype: str) -> tuple[list[str], list[str]]:
    """Ids of all cases run, and of those failed, on a copy without any fault."""
    results = run_copy(impl, goldens(), dtype)
    return [result.case.id for result in results], [r.case.id for r in results if not r.ok]


@functools.cache
def faultless_fit(impl: str) -> str | None:
    """What the check of fit says of a copy without any fault."""
    return fit_of_copy(impl)


def parameter(mutant: Mutant):
    """The mutant under its name; one that is pending must fail, and only by its verdict."""
    pending = pytest.mark.xfail(strict=True, raises=AssertionError, reason=mutant.pending)
    marks = [pending] if mutant.pending else []
    return pytest.param(mutant, id=f"{mutant.impl}-{mutant.name}", marks=marks)


@pytest.mark.parametrize("mutant", [parameter(mutant) for mutant in MUTANTS])
def test_the_fault_is_caught_where_it_is(mutant):
    if mutant.impl == "torch":
        pytest.importorskip("torch").set_num_threads(1)
    if mutant.clause == FIT:
        assert faultless_fit(mutant.impl) is None
        assert try_mutant(mutant, goldens()).problem is None, mutant.fault
        return
    ran, failed = faultless(mutant.impl, mutant.dtype)
    assert ran
    assert not failed, "the implementation fails without any fault, so a kill shows nothing"
    verdict = try_mutant(mutant, goldens())
    assert verdict.problem is None, f"{mutant.fault} {verdict.problem}"
    assert verdict.margin > 1


@pytest.mark.parametrize("impl", SLOW)
def test_faults_in_a_slow_framework_are_caught_where_they_are(impl):
    pytest.importorskip({"tf": "tensorflow", "jax": "jax"}[impl])
    every = [mutant for mutant in load_mutants(impl) if mutant.dtype == "float64"]
    names = [next(m.name for m in every if m.clause == clause) for clause in QUICK]
    rows = list(rows_of({"impl": impl, "dtype": "float64", "names": names}))
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert not [row["problem"] for row in rows if row["problem"]]


def test_there_are_many_and_every_clause_that_is_checked_has_some():
    sure = [mutant for mutant in ALL if not mutant.pending]
    for impl in IMPLS:
        own = [mutant for mutant in sure if mutant.impl == impl]
        assert {mutant.clause for mutant in own} >= CLAUSES
        assert len(own) >= LEAST
    assert {mutant.dtype for mutant in sure} == {"float64", "float32"}


TRAPS: dict[str, set[str]] = {
    "float32 cumprod": {"cumprod-in-float32"},
    "one beta endpoint off": {"linear-last-beta-left-out", "linear-first-beta-left-out"},
    "cosine unclipped": {"cosine-unclipped"},
    "alphas_cumprod_prev[0] not 1": {"cumprod-prev-not-one"},
    "log(0) at t=0": {"ddpm-log-of-zero", "ddpm-clipped-log-variance"},
    "noise at t=0": {"ddpm-noise-at-the-end"},
    "large for small variance": {"ddpm-variance-swapped"},
    "the two roots swapped": {"q-sample-factors-swapped"},
    "t gathered along the wrong axis": {"times-along-the-wrong-axis"},
    "clip missing": {"clip-missing"},
    "eps not derived again": {"eps-not-derived-again"},
    "DDIM times off by one": {"ddim-times-rounded-first"},
    "DDIM times never at T-1": {"ddim-times-never-at-the-last"},
    "DDIM ending at alphas_cumprod[0]": {"ddim-ends-at-first-table-entry"},
    "eta wrong": {"ddim-eta-left-out", "ddim-eta-on-the-variance"},
    "guidance as c+w(c-u)": {"guide-from-the-label"},
    "null class 0": {"null-label-is-zero"},
    "null class K-1": {"null-label-is-the-last-class"},
    "dropout mask inverted": {"dropout-inverted"},
    "dropout mask per batch": {"dropout-for-the-whole-batch"},
    "stride-2 padding (1,1)": {"downsample-padded-all-round"},
    "GroupNorm epsilon 1e-5": {"group-norm-epsilon-1e-5"},
    "GroupNorm epsilon 1e-3": {"group-norm-epsilon-1e-3"},
    "one-pass variance": {"group-norm-one-pass"},
    "epsilon outside the root": {"group-norm-epsilon-outside-the-root"},
    "ddof=1": {"group-norm-unbiased"},
    "groups interleaved": {"group-norm-interleaved"},
    "attention scale 1/C": {"attention-scale-1-over-c"},
    "softmax over queries": {"attention-over-queries"},
    "residual from the normalised input": {"attention-residual-from-normalised"},
    "H and W flattened in the wrong order": {"attention-columns-first"},
    "cos before sin": {"time-cosine-first"},
    "half for half-1": {"time-half-for-half-minus-one"},
    "t in low precision": {"time-in-float32"},
    "upsample by tiling": {"upsample-tiled"},
    "skip order": {"skip-before-hidden"},
    "HWIO/OIHW transposed": {"kernel-axes-swapped"},
    "kernel flipped": {"kernel-flipped"},
    "Adam epsilon 1e-7": {"adam-epsilon-1e-7"},
    "Adam epsilon hat": {"adam-epsilon-hat"},
    "Adam epsilon inside the root": {"adam-epsilon-inside-the-root"},
    "Adam's step counted from 0": {"adam-counts-from-zero"},
    "loss summed": {"loss-summed"},
    "loss averaged per batch": {"loss-averaged-over-the-batch"},
    "EMA before the update": {"ema-before-the-update"},
    "EMA without warm-up": {"ema-without-warm-up"},
    "gradients not zeroed": {"gradients-not-zeroed"},
    "arrays aliased in place": {"ema-is-the-parameters"},
    "a Python scalar frozen at trace time": {"adam-step-frozen"},
    "a reused key": {"draws-keyed-by-the-seed-alone"},
    "TF32 left on for float32": {"conv-inputs-in-tf32"},
}
IMPOSSIBLE = {  # a trap that cannot be fallen into, and why
    ("tf", "gradients not zeroed"): "a tape gives new tensors, and nothing is there to be zeroed",
    ("jax", "gradients not zeroed"): "a gradient is what a function gives, and new each time",
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_of_the_spec_is_a_fault_of_every_implementation(impl, trap):
    found = TRAPS[trap] & {m.name for m in load_mutants(impl) if not m.pending}
    assert bool(found) != ((impl, trap) in IMPOSSIBLE)


def test_faults_are_told_in_sentences():
    assert not [mutant.name for mutant in ALL if not mutant.fault.endswith(".")]


def test_every_fault_fits_its_implementation_and_has_its_cause_and_its_cases():
    for mutant in ALL:
        source = (ROOT / f"impl_{mutant.impl}" / mutant.file).read_text(encoding="utf-8")
        compile(mutated(source, mutant), mutant.file, "exec")
        assert mutant.cause, mutant.name
    some = {(m.impl, m.clause, m.dtype, m.cases): m for m in ALL if m.clause != FIT}
    for mutant in some.values():
        clauses = {case.clause for case in cases_for(mutant, goldens(), mutant.dtype)}
        assert mutant.clause in clauses, mutant.name


def test_the_page_tells_of_every_fault_and_of_no_survivor():
    text = PAGE.read_text(encoding="utf-8")
    missing = [mutant.name for mutant in ALL if f"`{mutant.name}`: " not in text]
    assert not missing, "write the page anew: nox -s mutants -- --page docs/mutants.md"
    tried, _, rest = text.partition("### Not tried yet")
    untried = [mutant.name for mutant in ALL if f"- `{mutant.name}`: " in rest]
    assert untried or f" {len(ALL)} |" in text
    assert "of 0 (" not in tried
    assert " ! |" not in text


# --- automatic mutants -------------------------------------------------------------------------


def changes(source: str) -> set[str]:
    """The mutated first lines of a source."""
    return {mutant.new for mutant in auto.mutations(source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a + b", {"a - b"}),
        ("a ** b", {"a * b"}),
        ("x += y", {"x -= y"}),
        ("(a) / (b)", {"(a) * (b)"}),
        ("a < b", {"a <= b", "a >= b"}),
        ("a is not None", {"a is None"}),
        ("not a", {"a"}),
        ("f(-b)", {"f(b)"}),
        ("a if b else c", {"a if not (b) else c"}),
        ("f(0, True)", {"f(1, True)", "f(0, False)"}),
        ("f(0.5)", {"f(1.5)", "f(1.0)"}),
        ("a[t]", {"a[t + 1]"}),
        ("a['key']", set()),
        ("f'{a + 1}'", set()),
        ("'ü', a + b", {"'ü', a - b"}),
    ],
)
def test_what_is_mutated(source, expected):
    assert changes(source) == expected


def test_equivalents_are_there_and_have_reasons():
    mutants = [mutant for impl in auto.IMPLS for mutant in auto.mutants_of(impl)]
    known = auto.load_equivalents()
    assert not auto.stale(known, mutants)
    assert all(one.reason.endswith(".") for one in known)
    gone = dataclasses.replace(known[0], old="no such line")
    assert auto.stale([gone], mutants)


def test_a_wrong_equivalent_is_refused(tmp_path):
    path = tmp_path / "equivalent.toml"
    path.write_text("[[equivalent]]\nimpls = ['numpy']", encoding="utf-8")
    with pytest.raises(MutantError, match=r"every .*needs impls, file, function"):
        auto.load_equivalents(path)


def test_a_sample_of_automatic_mutants_is_killed_or_known():
    verdicts = list(auto.run_auto("numpy", goldens(), every=53))
    assert len(verdicts) == -(-len(auto.mutants_of("numpy")) // 53)
    assert not [v.mutant.name for v in verdicts if v.by is None and v.reason is None]
    assert len({v.by for v in verdicts}) > 3


def test_a_mutant_that_hangs_or_dies_is_told():
    def hang():
        while True:
            pass

    assert auto.forked(hang, 1) == auto.HANGS
    assert auto.forked(lambda: os._exit(3), 5) == "the process died"
    assert auto.forked(lambda: "done", 5) == "done"
    with pytest.raises(MutantError, match="ZeroDivisionError"):
        auto.forked(lambda: 1 / 0, 5)


# --- the report --------------------------------------------------------------------------------


def a_row(**changes) -> dict:
    row = {
        "impl": "numpy",
        "name": "made-up",
        "fault": "It is made up.",
        "expected": {"clause": "S2", "block": None, "cause": "swapped"},
        "pending": None,
        "dtype": "float64",
        "mode": "eager",
        "killed": True,
        "case": "L1/tiny/q_sample",
        "clause": "S2",
        "block": None,
        "margin": 12345.0,
        "cause_named": True,
        "problem": None,
    }
    return {**row, **changes}


def test_figures_count_what_was_asked():
    lost = a_row(killed=False, clause="", margin=None, cause_named=False, problem="survived")
    found = report.figures([a_row(), a_row(margin=float("inf"), clause="S3"), lost])
    assert (found["mutants"], found["killed"], found["right_clause"]) == (3, 2, 1)
    assert (found["with_cause"], found["right_cause"]) == (3, 2)
    assert found["smallest_margin"] == 12345.0


def test_the_page_marks_a_survivor():
    lost = a_row(impl="torch", killed=False, clause="", margin=None, problem="survived")
    waiting = a_row(name="waits", killed=False, margin=None, pending="no golden asks for it")
    text = report.page([a_row(), lost, waiting], [])
    assert "### Not caught yet\n\n- numpy: waits: no golden asks for it\n" in text
    assert "| `made-up`: It is made up. | 1.2e4 |  ! |" in text
    assert "| killed | 1 of 2 (50.0 %) | 0 of 1 (0.0 %) | 1 of 3 (33.3 %) |" in text


@pytest.fixture
def every_row(tmp_path):
    """A file of rows of every fault there is, all found on the files as they are."""
    store = rows.Rows(tmp_path / "rows.json")
    for mutant in ALL:
        expected = {"clause": mutant.clause, "block": mutant.block, "cause": mutant.cause}
        row = a_row(impl=mutant.impl, name=mutant.name, fault=mutant.fault, expected=expected)
        store.curated[mutant.impl, mutant.name] = {**row, "of": rows.stamp_of(mutant)}
    for impl in auto.IMPLS:
        of = rows.stamp_of_auto(impl)
        for mutant in auto.mutants_of(impl):
            fields = {**dataclasses.asdict(mutant), "by": "L1/tiny/guide_1 float64", "of": of}
            del fields["source"]
            store.automatic.setdefault(impl, []).append({**fields, "reason": None})
    store.save()
    return store


def run_command(*arguments: str):
    from typer.testing import CliRunner

    from conformance.mutants.__main__ import app

    return CliRunner().invoke(app, arguments)


def test_the_page_is_written_from_rows_and_nothing_is_tried_again(every_row, tmp_path):
    page, reports = tmp_path / "page.md", tmp_path / "reports"
    arguments = ["--rows", str(every_row.path), "--page", str(page), "--reports", str(reports)]
    before = every_row.path.read_text(encoding="utf-8")
    found = run_command(*arguments)
    assert found.exit_code == 0, found.output
    assert "mutants: 0" in found.output
    assert every_row.path.read_text(encoding="utf-8") == before
    text = page.read_text(encoding="utf-8")
    assert f"| mutants | {' | '.join(str(len(load_mutants(i))) for i in report.ORDER)} | " in text
    assert (
        f"| {len(auto.mutants_of('torch'))} of {len(auto.mutants_of('torch'))} (100.0 %) |" in text
    )
    assert run_command(*arguments, "--auto").exit_code == 0


def test_a_page_may_name_what_was_not_tried_and_keep_what_it_told_of_automatic_faults(
    every_row, tmp_path
):
    page, reports = tmp_path / "page.md", tmp_path / "reports"
    arguments = ["--rows", str(every_row.path), "--page", str(page), "--reports", str(reports)]
    assert run_command(*arguments).exit_code == 0
    told = report.section_of(page)
    assert told.startswith(report.CHOSEN_BY_NOBODY)
    for name, row in list(every_row.curated.items()):
        if name[0] == "jax":
            row["of"] = "of another time"
    every_row.automatic["torch"].pop()
    every_row.save()
    for _ in range(2):  # the second time from a page that was written so
        done = run_command(*arguments, "--impl", "numpy", "--untried")
        assert done.exit_code == 0, done.output
        text = page.read_text(encoding="utf-8")
        count = len(load_mutants("jax"))
        assert f"no verdict on the files as they are ({count} of JAX)" in text
        assert all(f"`{mutant.name}`: " in text for mutant in load_mutants("jax"))
        assert f" {len(ALL) - count} |" in text
        assert text.count(report.EARLIER) == 1
        assert text.endswith(told.partition("\n\n")[2])
    assert run_command("--untried").exit_code == 2


def test_a_stale_row_is_tried_again_and_kept(every_row, tmp_path):
    page, reports = tmp_path / "page.md", tmp_path / "reports"
    mutant = next(m for m in ALL if (m.impl, m.name) == ("numpy", "q-sample-factors-swapped"))
    key = mutant.impl, mutant.name
    every_row.curated[key]["of"] = "of another time"
    every_row.save()
    arguments = ["--rows", str(every_row.path), "--page", str(page), "--reports", str(reports)]
    refused = run_command(*arguments, "--impl", "torch")
    assert refused.exit_code == 1
    assert "1 of numpy (q-sample-factors-swapped); run with --impl numpy" in " ".join(
        refused.output.split()
    )
    assert not page.exists()
    assert run_command(*arguments, "--impl", "numpy").exit_code == 0
    assert f"`{key[1]}`" in page.read_text(encoding="utf-8")
    again = rows.Rows(every_row.path)
    assert again.curated[key]["margin"] > 1e9  # and no more that of a_row
    assert again.curated[key]["of"] == rows.stamp_of(mutant)


def test_a_wrong_verdict_is_tried_again_though_its_row_is_fresh(every_row):
    mutant = next(m for m in ALL if m.impl == "numpy")
    assert every_row.settled(mutant)
    every_row.curated[mutant.impl, mutant.name]["problem"] = "survived"
    assert every_row.fresh(mutant)
    assert not every_row.settled(mutant)


def test_automatic_rows_are_refused_where_one_is_missing(every_row):
    every_row.automatic["numpy"].pop()
    with pytest.raises(rows.StaleError, match=r"faults of numpy; run with --auto --impl numpy"):
        every_row.automatic_rows()


def test_rows_are_not_kept_where_the_files_changed_as_they_ran(tmp_path, monkeypatch):
    store = rows.Rows(tmp_path / "rows.json")
    job = {"impl": "numpy", "dtype": "float64", "names": ["q-sample-factors-swapped"]}
    store.expect([job])
    monkeypatch.setattr(rows, "stamp", lambda impl, text: "of other files")
    with pytest.raises(MutantError, match="1 rows of numpy are not kept"):
        store.keep(job, [a_row(name="q-sample-factors-swapped")])
    assert not store.path.exists()


def test_two_runs_may_keep_their_rows_in_one_file(tmp_path):
    both = [rows.Rows(tmp_path / "rows.json") for _ in range(2)]
    names = ["q-sample-factors-swapped", "clip-missing"]
    for store, name in zip(both, names, strict=True):
        job = {"impl": "numpy", "dtype": "float64", "names": [name]}
        store.expect([job])
        store.keep(job, [a_row(name=name)])
    assert set(rows.Rows(tmp_path / "rows.json").curated) == {("numpy", name) for name in names}


def test_parts_of_automatic_rows_are_whole_together_and_none_is_there_twice(every_row, tmp_path):
    found = [dict(row) for row in every_row.automatic["numpy"]]
    store = rows.Rows(tmp_path / "others.json")
    jobs = [{"impl": "numpy", "auto": {"part": [part, 2], "every": 1}} for part in range(2)]
    store.expect(jobs)
    for part in (0, 0, 1):
        assert not store.fresh_auto("numpy")
        store.keep(jobs[part], found[part::2])
    assert store.fresh_auto("numpy")


def test_a_job_is_kept_whole_and_so_is_not_long():
    chosen = load_mutants("numpy")
    jobs = jobs_of(chosen, None, 1)
    assert max(len(job["names"]) for job in jobs) <= MOST
    assert sorted(name for job in jobs for name in job["names"]) == sorted(m.name for m in chosen)
    few = jobs_of(chosen[:3], "float32", 2)
    assert few == [{"impl": "numpy", "dtype": "float32", "names": [m.name for m in chosen[:3]]}]


def test_a_fault_that_is_there_no_more_loses_its_row(every_row):
    every_row.curated["numpy", "of-old"] = a_row(name="of-old", of="")
    every_row.save()
    assert ("numpy", "of-old") not in rows.Rows(every_row.path).curated


def test_a_file_that_holds_no_rows_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]", encoding="utf-8")
    found = run_command("--impl", "numpy", "--name", "q-sample-*", "--rows", str(path))
    assert found.exit_code == 2
    assert "holds no rows of mutants" in " ".join(found.output.split())
    assert run_command("--rows", str(path), "--dtype", "float32").exit_code == 2


def test_cases_run_by_level_and_are_the_tiny_ones():
    cases = golden_cases(goldens(), "float64")
    assert [case.level for case in cases] == sorted(case.level for case in cases)
    assert {case.config.name[:4] for case in cases} == {"tiny"}


# --- the engine itself -------------------------------------------------------------------------


def a_mutant(**changes) -> Mutant:
    fields = {"name": "made-up", "impl": "numpy", "file": "diffusion.py", "old": "a", "new": "b"}
    return Mutant(**{**fields, "clause": "S2", "fault": "It is made up.", **changes})


@pytest.mark.parametrize(("source", "count"), [("x + y", 0), ("a + a", 2)])
def test_a_text_that_is_not_there_once_is_refused(source, count):
    with pytest.raises(MutantError, match=rf"made-up .* stands {count} times .* has changed"):
        mutated(source, a_mutant())


def test_a_mutant_that_changes_nothing_is_refused():
    with pytest.raises(MutantError, match="old and new are the same"):
        mutated("a", a_mutant(new="a"))


def test_a_missing_file_is_named():
    with (
        pytest.raises(MutantError, match=r"impl_numpy/absent.py is not there"),
        copied("numpy", a_mutant(file="absent.py")),
    ):
        pass


def test_a_mutant_that_is_no_python_is_no_kill():
    broken = a_mutant(old="return a * x0 + b * noise", new="return (")
    with pytest.raises(MutantError, match="cannot be imported, and so shows nothing"):
        try_mutant(broken, goldens())


def test_a_change_without_effect_survives():
    same = a_mutant(old="return a * x0 + b * noise", new="return b * noise + a * x0")
    verdict = try_mutant(same, goldens())
    assert not verdict.killed
    assert verdict.problem == "survived: every case passed"


def test_a_fault_that_fit_does_not_show_survives():
    same = a_mutant(old="return a * x0 + b * noise", new="return b * noise + a * x0", clause=FIT)
    verdict = try_mutant(same, goldens())
    assert verdict.problem == "survived: the check of fit passed"
    assert (verdict.case, verdict.margin) == ("", 0.0)


def test_a_fit_that_raises_is_a_kill():
    old = "noise=generator.standard_normal"
    raising = a_mutant(file="train.py", old=old, new="noise=generator.absent", clause=FIT)
    verdict = try_mutant(raising, goldens())
    assert verdict.killed
    assert "fit raised AttributeError" in verdict.told


def test_a_wrong_expectation_is_told():
    wrong = a_mutant(old="return a * x0 + b * noise", new="return a * x0 - b * noise", clause="S7")
    verdict = try_mutant(wrong, goldens())
    assert verdict.killed
    assert verdict.problem == "caught at S2 by L1/tiny/q_sample; expected S7"
    raised = dataclasses.replace(wrong, clause="S2", status="error")
    assert "ended with 'failed'" in try_mutant(raised, goldens()).problem
    block = a_mutant(file="layers.py", old="EPS = 1e-6", new="EPS = 1e-3", clause="S7", block="emb")
    assert "names block down_blocks.0.resnets.0" in try_mutant(block, goldens()).problem


def test_the_real_package_is_back_after_a_copy():
    import impl_numpy
    from impl_numpy import diffusion

    before = list(sys.path)
    with copied("numpy") as module:
        assert module is not impl_numpy
        assert sys.modules["impl_numpy"] is module
        assert sys.modules["impl_numpy.diffusion"] is not diffusion
    assert sys.modules["impl_numpy"] is impl_numpy
    assert sys.modules["impl_numpy.diffusion"] is diffusion
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x]\nfile = 1", "missing keys old, new, clause, fault"),
        ("[x]\nname = 'y'", "unknown keys name"),
        ("[x", "is not TOML"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, monkeypatch, text, message):
    from conformance.mutants import engine

    (tmp_path / "numpy.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(engine, "HERE", tmp_path)
    with pytest.raises(MutantError, match=message):
        load_mutants("numpy")


def test_the_command_tells_and_fails(tmp_path):
    reports = ("--reports", str(tmp_path))
    caught = run_command("--impl", "numpy", "--name", "q-sample-*", *reports)
    assert caught.exit_code == 0, caught.output
    assert "L1/tiny/q_sample (S2)" in caught.output
    assert "smallest margins" in caught.output
    assert "`q-sample-in-place`" in (tmp_path / "mutants.md").read_text(encoding="utf-8")
    assert run_command("--impl", "cobol").exit_code == 2
    assert run_command("--name", "no-such-*").exit_code == 2
