"""Running cases in this process: verdicts on models that break the protocol, and what is said."""

import dataclasses

import conformance_fakes as fakes
import numpy as np
import pytest
from conformance_fakes import Backend, Fake, case_named, write_goldens

from conformance import Result, UsageError, check, check_backend, diagnose
from conformance.compare import Finding, Measure, hidden
from conformance.diagnose import looks_like, out_alone
from conformance.execute import Session
from conformance.runner import finish, in_column, judge, select
from spec.goldens import Goldens
from spec.params import initial_params


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    return Goldens(write_goldens(tmp_path_factory.mktemp("goldens")))


def verdict(model_class, goldens, case_id, dtype="float64", then=None):
    """The Result of one case (after case `then` on the same models)."""
    session = Session(Backend(model_class), goldens, dtype, "cpu")
    if then:
        session.attempt(case_named(goldens, then))
    case = case_named(goldens, case_id)
    return judge(goldens, "fake", dtype, case, session.attempt(case))


def test_a_right_backend_passes_everything(goldens):
    results = check_backend(Backend(Fake), goldens=goldens)
    assert [result.case.id for result in results] == 2 * [case.id for case in goldens.cases]
    assert {result.dtype for result in results} == {"float64", "float32"}
    assert all(result.ok for result in results), [r for r in results if not r.ok]
    assert all(result.ratio <= 1 for result in results)


def test_check_yields_as_it_goes(goldens):
    class Opened(Fake):
        count = 0

        def __init__(self, *args):
            type(self).count += 1
            super().__init__(*args)

    first = next(check(Backend(Opened), ["float64"], goldens=goldens))
    assert first.case.level == 0
    assert Opened.count == 1


def test_cases_are_chosen_by_glob_or_given(goldens):
    results = check_backend(Backend(Fake), ["float32"], ["L1/*"], goldens=goldens)
    assert {result.case.level for result in results} == {1}
    case = goldens.cases[0]
    assert [r.case for r in check_backend(Backend(Fake), ["float32"], [case], goldens=goldens)] == [
        case
    ]
    with pytest.raises(UsageError, match="matches none"):
        check_backend(Backend(Fake), cases=["L9/*"], goldens=goldens)
    with pytest.raises(UsageError, match="bfloat16"):
        check_backend(Backend(Fake), ["bfloat16"], goldens=goldens)


def test_models_are_kept_and_their_state_is_put_back(goldens):
    class Counted(Fake):
        count = 0

        def __init__(self, *args):
            type(self).count += 1
            super().__init__(*args)

    results = check_backend(Backend(Counted), ["float64"], goldens=goldens)
    assert all(result.ok for result in results)
    assert Counted.count == len({(case.config, case.params) for case in goldens.cases})


def test_a_model_that_cannot_load_a_state_is_opened_anew(goldens):
    class NoLoad(Fake):
        load_state = None

    results = {r.case.id: r for r in check_backend(Backend(NoLoad), ["float64"], goldens=goldens)}
    assert results["L5/tiny/train_steps"].ok
    assert results["L5/tiny/apply_later"].status == "not implemented"
    assert "load_state" in results["L5/tiny/apply_later"].message
    assert sum(not result.ok for result in results.values()) == 1


# --- models that break the protocol --------------------------------------------------------------


class ScalarPredict(Fake):
    def predict(self, x, t, labels=None):
        return 1.5


class TupleOfThree(Fake):
    def predict_x0_eps(self, x_t, t, out):
        return out, out.copy(), 0


class ListOfTwo(Fake):
    def loss_and_grads(self, *args, **more):
        return list(super().loss_and_grads(*args, **more))


class ArrayLoss(Fake):
    def loss_and_grads(self, *args, **more):
        loss, grads = super().loss_and_grads(*args, **more)
        return np.array([loss]), grads


class NoLoss(Fake):
    def train_step(self, *args, **more):
        super().train_step(*args, **more)


class ListsInTree(Fake):
    def taps(self, *args, **more):
        return {name: value.tolist() for name, value in super().taps(*args, **more).items()}


class ArrayForTree(Fake):
    def schedule(self):
        return np.ones(3)


class Objects(Fake):
    def guide(self, *args, **more):
        return np.array([None])


class ChangesX0(Fake):
    def q_sample(self, x0, t, noise):
        x0 *= 2
        return super().q_sample(x0, t, noise)


class ChangesGrads(Fake):
    def apply_gradients(self, grads):
        grads["conv_in.bias"] *= 0.5
        super().apply_gradients(grads)


class DropsGrads(Fake):
    def apply_gradients(self, grads):
        super().apply_gradients(grads)
        del grads["conv_in.bias"]


class GivesItsArgument(Fake):
    def target(self, x0, t, noise):
        return noise[::-1][::-1]


class AppliesAndReturns(Fake):
    def apply_gradients(self, grads):
        super().apply_gradients(grads)
        return self


class CountsWrong(Fake):
    def state(self):
        return super().state() | {"step": 0}


class LosesAParameter(Fake):
    def state(self):
        state = super().state()
        del state["ema"]["conv_in.bias"]
        return state


class NoEma(Fake):
    def state(self):
        state = super().state()
        del state["ema"]
        return state


class WideState(Fake):
    def state(self):
        state = super().state()
        return state | {"m": {k: v.astype(np.float16) for k, v in state["m"].items()}}


class SharedState(Fake):
    """Gives the arrays that it goes on to change."""

    kept = None

    def state(self):
        state = super().state()
        self.kept = self.kept or state
        for part in ("params", "m", "v", "ema"):
            for name, value in state[part].items():
                self.kept[part][name][...] = value
        self.kept["step"] = state["step"]
        return self.kept


class TrainsInPlace(Fake):
    """Updates its parameters where they stand."""

    def apply_gradients(self, grads):
        before = self.now["params"]
        super().apply_gradients(grads)
        for name, value in self.now["params"].items():
            before[name][...] = value
        self.now["params"] = before


class KeepsTheOpened(TrainsInPlace):
    def __init__(self, config, params, dtype):
        super().__init__(config, params, dtype)
        self.now["params"] = dict(params)


class KeepsTheLoaded(TrainsInPlace):
    def load_state(self, state):
        super().load_state(state)
        self.now["params"] = dict(state["params"])


class KeepsGradients(Fake):
    """Takes the first gradients for its m, and goes on in that array."""

    kept = None

    def apply_gradients(self, grads):
        if self.kept is not None:
            self.kept["conv_in.bias"] *= 0.9
        super().apply_gradients(grads)
        self.kept = self.kept or grads


class ScalesTheOpened(Fake):
    def __init__(self, config, params, dtype):
        params["conv_in.bias"] *= 2
        super().__init__(config, params, dtype)


class ForgetsM(Fake):
    def load_state(self, state):
        moments = self.now["m"]
        super().load_state(state)
        self.now["m"] = moments


class NoTables(Fake):
    def schedule(self):
        super().schedule()


class NoPair(Fake):
    def predict_x0_eps(self, x_t, t, out):
        super().predict_x0_eps(x_t, t, out)


FAULTS = [
    (ScalarPredict, "L3/tiny/predict", "predict gave a float; expected a NumPy array"),
    (TupleOfThree, "L1/tiny/predict_x0_eps", "predict_x0_eps gave a tuple of 3; expected a tuple"),
    (ListOfTwo, "L4/tiny/grads", "loss_and_grads gave a list of 2; expected a tuple of 2"),
    (ArrayLoss, "L4/tiny/grads", "gave a numpy.ndarray as the loss; expected a float"),
    (NoLoss, "L5/tiny/train_steps", "train_step gave None as the loss; expected a float (is a `r"),
    (NoTables, "L0/tiny/schedule", "expected a dict of NumPy arrays by name (is a `return` missi"),
    (
        NoPair,
        "L1/tiny/predict_x0_eps",
        "expected a tuple of 2: x0 and eps (is a `return` missing?)",
    ),
    (ListsInTree, "L3/tiny/taps", "taps: time_proj gave a list of 3; expected a NumPy array"),
    (ArrayForTree, "L0/tiny/schedule", "schedule gave a numpy.ndarray; expected a dict"),
    (Objects, "L1/tiny/guide", "dtype object"),
    (ChangesX0, "L1/tiny/q_sample", "q_sample changed its argument x0"),
    (ChangesGrads, "L5/tiny/apply", "changed its argument grads[conv_in.bias]"),
    (DropsGrads, "L5/tiny/apply", "changed its argument grads: keys came or went"),
    (GivesItsArgument, "L1/tiny/target", "target gave its own argument noise as out"),
    (AppliesAndReturns, "L5/tiny/apply", "apply_gradients gave something back"),
    (CountsWrong, "L5/tiny/apply", "state gave step 0 after 3 steps"),
    (LosesAParameter, "L5/tiny/apply", "the ema of state: missing conv_in.bias"),
    (NoEma, "L5/tiny/apply", "state gave step, params, m, v; expected a dict of step"),
    (WideState, "L5/tiny/train_steps", "is float16 ["),
    (SharedState, "L5/tiny/train_steps", "a later step changed that array in place"),
]


@pytest.mark.parametrize(("model", "case_id", "text"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_a_broken_protocol_is_named(goldens, model, case_id, text):
    result = verdict(model, goldens, case_id)
    assert result.status == "fault"
    assert text in result.message
    assert not result.ok


def test_a_state_that_is_not_put_back_is_named(goldens):
    result = verdict(ForgetsM, goldens, "L5/tiny/train_steps", then="L5/tiny/apply")
    assert result.status == "fault"
    assert "load_state, then state: m[" in result.message


@pytest.mark.parametrize(
    ("model", "first", "case_id", "text"),
    [
        (KeepsTheOpened, None, "L5/tiny/train_steps", "open was given params["),
        (KeepsTheOpened, None, "L5/tiny/apply", "open was given params["),
        (ScalesTheOpened, None, "L3/tiny/predict", "open was given params[conv_in.bias]"),
        (KeepsTheLoaded, None, "L5/tiny/apply_later", "load_state was given params["),
        (KeepsTheLoaded, "L5/tiny/apply", "L5/tiny/train_steps", "load_state was given params["),
        (KeepsGradients, None, "L5/tiny/apply", "apply_gradients was given grads[conv_in.bias]"),
    ],
)
def test_a_model_that_works_in_the_arrays_it_was_given_is_named(
    goldens, model, first, case_id, text
):
    result = verdict(model, goldens, case_id, then=first)
    assert result.status == "fault"
    assert text in result.message
    assert "keep a copy" in result.message


def test_a_model_that_works_in_arrays_of_its_own_is_right(goldens):
    for case_id in ("L5/tiny/apply", "L5/tiny/apply_later", "L5/tiny/train_steps"):
        assert verdict(TrainsInPlace, goldens, case_id, then="L5/tiny/apply").ok


class Raises(Fake):
    def predict(self, x, t, labels=None):
        raise ValueError("no such luck")


class Exits(Fake):
    def predict(self, x, t, labels=None):
        raise SystemExit(0)


class Unfinished(Fake):
    taps = None

    def predict(self, x, t, labels=None):
        raise NotImplementedError("later")


def test_exceptions_are_verdicts(goldens):
    result = verdict(Raises, goldens, "L3/tiny/predict")
    assert (result.status, result.message) == ("error", "ValueError: no such luck")
    assert "in predict" in result.trace
    assert verdict(Exits, goldens, "L3/tiny/predict").status == "error"
    result = verdict(Unfinished, goldens, "L3/tiny/predict")
    assert (result.status, result.message) == ("not implemented", "later")
    result = verdict(Unfinished, goldens, "L3/tiny/taps")
    assert (result.status, result.message) == ("not implemented", "the model has no method taps")


class Misspelt(Fake):
    schedule, predct, not_taps = None, Fake.predict, Fake.taps

    def shedule(self):
        return super().schedule()

    def __getattribute__(self, name):
        if name == "predict":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_method_that_is_misspelt_is_named(goldens):
    result = verdict(Misspelt, goldens, "L0/tiny/schedule")
    assert result.status == "not implemented"
    assert result.message == "the model has no method schedule, but shedule: is that meant?"
    result = verdict(Misspelt, goldens, "L3/tiny/predict")
    assert result.message == "the model has no method predict, but predct: is that meant?"


def test_an_open_that_gives_nothing_is_named(goldens):
    class Nothing:
        name, modes = "nothing", ("eager",)

        @staticmethod
        def open(config, params=None, **options):
            Fake(config, params or initial_params(config, 0), options["dtype"])

    (result,) = check_backend(Nothing, ["float64"], ["L0/*"], goldens=goldens)
    assert result.status == "fault"
    assert result.message == "open gave None; expected a model: is its `return` missing?"


class Promotes(Fake):
    def q_sample(self, x0, t, noise):
        return super().q_sample(x0, t, noise).astype(np.float64)

    def target(self, x0, t, noise):
        return super().target(x0, t, noise).astype(np.float16)

    def schedule(self):
        tables = super().schedule()
        return {**{k: v.astype(np.float64) for k, v in tables.items()}, "betas": tables["betas"]}


def test_a_dtype_that_is_wrong_has_a_clue_and_no_cause_of_numbers(goldens):
    result = verdict(Promotes, goldens, "L1/tiny/q_sample", "float32")
    assert "out has dtype float64; expected float32" in result.message
    assert [clue for clue in result.clues if "np.sqrt or np.exp of a whole number" in clue]
    assert result.causes == ()
    finish([result := verdict(Promotes, goldens, "L0/tiny/schedule", "float32")])
    assert not [clue for clue in result.clues if clue.startswith("mend ")]
    result = verdict(Promotes, goldens, "L1/tiny/target", "float32")
    assert "cast the result to the dtype that open was given" in result.clues


def test_a_result_of_nearly_the_right_name_is_told(goldens):
    class Named(Fake):
        def schedule(self):
            tables = super().schedule()
            return {"alpha_cumprod" if k == "alphas_cumprod" else k: v for k, v in tables.items()}

    result = verdict(Named, goldens, "L0/tiny/schedule")
    assert "alpha_cumprod came and is no result: should it be alphas_cumprod?" in result.clues
    assert result.causes == ()


def test_what_passes_in_float64_alone_is_told_to_look_at_precision(goldens):
    class Rough(Fake):
        def q_sample(self, x0, t, noise):
            out = super().q_sample(x0, t, noise)
            return out if self.dtype == "float64" else (out * 1.01).astype(np.float32)

        def target(self, x0, t, noise):
            return super().target(x0, t, noise) * self.cast(np.array(1.01))

    results = check_backend(Backend(Rough), goldens=goldens, cases=["L1/*"])
    failed = {(r.dtype, r.case.call): r for r in results if not r.ok}
    assert set(failed) == {
        ("float32", "q_sample"),
        ("float32", "target"),
        ("float64", "target"),
    }
    told = {key for key, r in failed.items() if diagnose.EXACT_ELSEWHERE in r.clues}
    assert told == {("float32", "q_sample")}
    result = failed["float32", "q_sample"]
    causes = ("eta ignored", "a step in float32", "one-pass variance")
    case = dataclasses.replace(result.case, causes=causes)
    assert dataclasses.replace(result, case=case).causes == (
        *("one-pass variance", "a step in float32"),
        "eta ignored",
    )


def test_a_block_that_raises_stands_where_it_runs():
    goldens = Goldens()

    class Raising(Fake):
        def run_block(self, name, **given):
            if name == "emb":
                raise KeyError("linear_1.weight")
            return np.zeros(1, self.dtype)

    results = check_backend(
        Backend(Raising),
        ["float64"],
        ["L2/tiny/emb", "L2/tiny/down_blocks.0.resnets.0"],
        goldens=goldens,
    )
    first = min(results, key=Result.order)
    assert (first.case.id, first.status, first.block) == ("L2/tiny/emb", "error", "emb")


def test_a_describe_that_fails_costs_no_verdict(goldens):
    class Shy(Fake):
        def describe(self):
            raise RuntimeError("no")

    assert verdict(Shy, goldens, "L3/tiny/predict").ok


# --- numbers that are wrong, and what is said of them --------------------------------------------


class NaNStep(Fake):
    def ddpm_step(self, *args, **more):
        out = super().ddpm_step(*args, **more)
        out[1, 2, 3, 0] = np.nan
        return out


class MissingTap(Fake):
    def taps(self, *args, **more):
        taps = super().taps(*args, **more)
        del taps["conv_in"]
        return taps


class ExtraGradient(Fake):
    def loss_and_grads(self, *args, **more):
        loss, grads = super().loss_and_grads(*args, **more)
        return loss, grads | {"conv_in.scale": np.ones(2)}


class Float32Always(Fake):
    def q_sample(self, *args, **more):
        return super().q_sample(*args, **more).astype(np.float32)


@pytest.mark.parametrize(
    ("model", "case_id", "problem", "output"),
    [
        (NaNStep, "L1/tiny/ddpm_step", "not finite", "out"),
        (MissingTap, "L3/tiny/taps", "missing", "conv_in"),
        (ExtraGradient, "L4/tiny/grads", "extra", "grads/conv_in.scale"),
        (Float32Always, "L1/tiny/q_sample", "dtype", "out"),
    ],
)
def test_problems_without_a_size(goldens, model, case_id, problem, output):
    result = verdict(model, goldens, case_id)
    assert result.status == "failed"
    (bad,) = [finding for finding in result.findings if not finding.ok]
    assert (bad.problem, bad.output) == (problem, output)


class SwappedSkips(Fake):
    """Gives one up block its halves in the wrong order; the block itself is right."""

    def taps(self, x, t, labels=None):
        taps = super().taps(x, t, labels)
        names = list(taps)
        for name in names[names.index("up_blocks.0.resnets.1") :]:
            taps[name] = taps[name] * 1.5
        return taps


class WrongAttention(SwappedSkips):
    def run_block(self, name, **inputs):
        out = super().run_block(name, **inputs)
        return out * 1.01 if name == "down_blocks.1.attentions.0" else out

    def taps(self, x, t, labels=None):
        taps = Fake.taps(self, x, t, labels)
        names = list(taps)
        for name in names[names.index("down_blocks.1.attentions.0") :]:
            taps[name] = taps[name] * (1.01 if "conv_out" not in name else 7)
        return taps


def by_id(model, goldens, *globs):
    results = check_backend(Backend(model), ["float64"], globs, goldens=goldens)
    return {result.case.id: result for result in results}


def test_the_first_wrong_block_is_told_from_one_that_inherits(goldens):
    results = by_id(WrongAttention, goldens, "L2/*", "L3/*")
    alone = results["L2/tiny/down_blocks.1.attentions.0"]
    assert alone.block == "down_blocks.1.attentions.0"
    assert any("wrong by itself" in clue for clue in alone.clues)
    taps = results["L3/tiny/taps"]
    assert taps.block == "down_blocks.1.attentions.0"
    assert taps.worst.output == "down_blocks.1.attentions.0"  # not conv_out, which is worse
    assert any("it is wrong too: look in this block" in clue for clue in taps.clues)
    assert any("1.01 times the expected value" in clue for clue in taps.clues)


def test_a_block_that_is_right_alone(goldens):
    class Inherits(SwappedSkips):
        def taps(self, x, t, labels=None):
            taps = Fake.taps(self, x, t, labels)
            names = list(taps)
            for name in names[names.index("up_blocks.0.resnets.0") :]:
                taps[name] = taps[name] + 1
            return taps

    taps = by_id(Inherits, goldens, "L2/*", "L3/*")["L3/tiny/taps"]
    assert taps.block == "up_blocks.0.resnets.0"
    assert any("it is right, so look at what it is given" in clue for clue in taps.clues)
    results = by_id(SwappedSkips, goldens, "L2/*", "L3/*")
    taps = results["L3/tiny/taps"]
    assert taps.block == "up_blocks.0.resnets.1"
    assert any("--level 2 in the same command" in clue for clue in taps.clues)


def test_what_stands_on_the_network_points_at_its_taps(goldens):
    class WrongNetwork(Fake):
        def predict(self, *args, **more):
            return super().predict(*args, **more) * 2

        def taps(self, *args, **more):
            taps = super().taps(*args, **more)
            return taps | {"conv_out": taps["conv_out"] * 2}

        def loss_and_grads(self, *args, **more):
            loss, grads = super().loss_and_grads(*args, **more)
            return loss * 2, grads

    results = by_id(WrongNetwork, goldens)
    text = "the network is wrong already: see L3/tiny/taps, from conv_out on"
    assert results["L3/tiny/predict"].block == "conv_out"
    for case_id in ("L3/tiny/predict", "L4/tiny/grads", "L5/tiny/train_steps"):
        assert text in results[case_id].clues
    assert any("the loss itself is wrong" in clue for clue in results["L4/tiny/grads"].clues)
    assert results["L5/tiny/apply"].ok
    assert results["L6/digits/guided"].ok


def test_gradients_name_the_worst_and_where_the_backward_pass_goes_wrong(goldens):
    class WrongGradients(Fake):
        def loss_and_grads(self, *args, **more):
            loss, grads = super().loss_and_grads(*args, **more)
            for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_in.bias"):
                grads[name] = -grads[name]
            return loss, grads

    result = by_id(WrongGradients, goldens, "L4/*")["L4/tiny/grads"]
    assert result.block == "mid_block.resnets.0"
    text = "\n".join(result.clues)
    assert "worst of 3 gradients: " in text
    assert "grads/conv_in.weight" in text
    assert "has the opposite sign" in text
    assert "the loss itself" not in text


def test_a_training_state_tells_its_parts_apart(goldens):
    class EmaOnly(Fake):
        def state(self):
            state = super().state()
            return state | {"ema": {k: v * 1.01 for k, v in state["ema"].items()}}

    result = verdict(EmaOnly, goldens, "L5/tiny/apply")
    assert result.status == "failed"
    result = by_id(EmaOnly, goldens, "L5/tiny/apply")["L5/tiny/apply"]
    assert "right: delta, m, v" in result.clues[0]
    assert "wrong: ema_delta (" in result.clues[0]


def test_a_trajectory_names_its_first_wrong_step(goldens):
    class Drifts(Fake):
        def sample(self, *args, **more):
            steps = super().sample(*args, **more)
            steps[2:] += np.random.Generator(np.random.Philox(1)).normal(size=steps[2:].shape)
            return steps

    result = verdict(Drifts, goldens, "L6/digits/guided")
    assert "the first step out of tolerance is 3 of 4" in result.clues


X = np.random.Generator(np.random.Philox(5)).normal(size=(3, 4, 4, 6))


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (-X, "has the opposite sign"),
        (2 * X, "is 2 times the expected value"),
        (X + 0.5, "is the expected value + 0.5"),
        (np.zeros_like(X), "is zero everywhere"),
        (np.flip(X, 2), "reversed along axis 2"),
        (np.roll(X, 1, 1), "moved by one along axis 1"),
        (np.roll(X, -1, 3), "moved by minus one along axis 3"),
        (np.roll(X, 3, 3), "with the two halves of axis 3 exchanged"),
        (X.transpose(0, 2, 1, 3), "with axes in the order (0, 2, 1, 3)"),
        (X.transpose(0, 3, 1, 2), "with axes in the order (0, 3, 1, 2)"),
        (X.reshape(3, 16, 6), "holds the expected values in another shape"),
        (X + np.random.Generator(np.random.Philox(6)).normal(size=X.shape), None),
        (X * 1.0000001, "is 1.0000001 times the expected value"),
        (X[:2], None),
        (np.full_like(X, np.pi), None),
    ],
)
def test_likenesses(got, text):
    likeness = looks_like(got, X)
    assert likeness is None if text is None else text in likeness


def test_selection(goldens):
    assert [case.level for case in select(goldens, [0, 6])] == [0, 6]
    assert {case.id for case in select(goldens, [3], ["*taps"])} == {"L3/tiny/taps"}
    for levels, globs, text in (
        ([9], [], "--level 9 has no cases; the manifest has levels 0, 1, 2, 3, 4, 5, 6"),
        ([], ["L3/tiny/tap"], "ids look like L3/tiny/taps"),
        ([0], ["L3/*"], "matches none of 1 cases of --level 0 (a case must match both)"),
    ):
        with pytest.raises(UsageError, match=None) as caught:
            select(goldens, levels, globs)
        assert text in str(caught.value)


def test_cases_without_a_tolerance_are_left_out_whole_or_refused(goldens):
    case = case_named(goldens, "L3/tiny/taps")
    bare = [dataclasses.replace(output, tolerance={}) for output in case.outputs]
    assert in_column([dataclasses.replace(case, outputs=tuple(bare))], "float64") == []
    half = (*case.outputs[:3], *bare[3:])
    with pytest.raises(ValueError, match="for some outputs and none for"):
        in_column([dataclasses.replace(case, outputs=half)], "float64")


def test_an_unknown_call_is_the_manifests_fault(goldens):
    case = dataclasses.replace(case_named(goldens, "L0/tiny/schedule"), call="describe")
    session = Session(Backend(Fake), goldens, "float64", "cpu")
    with pytest.raises(ValueError, match="which this suite cannot make"):
        session.attempt(case)


def test_the_fakes_cover_every_call(goldens):
    calls = {case.call for case in goldens.cases}
    assert calls >= {"schedule", "predict", "taps", "train_steps", "apply_gradients", "sample"}
    assert len(fakes.BLOCKS) == 4


# --- what is named first --------------------------------------------------------------------------


def shifted(tables, *names):
    return tables | {name: tables[name] * 1.0001 for name in names}


@pytest.mark.parametrize(
    ("names", "first", "clue"),
    [
        (
            ("posterior_mean_coef2", "betas", "alphas"),
            "betas",
            "all others that are wrong are made",
        ),
        (("posterior_variance", "alphas_cumprod_prev"), "alphas_cumprod_prev", "are made from it"),
        (("posterior_variance", "sqrt_alphas_cumprod"), "sqrt_alphas_cumprod", None),
        (
            ("sqrt_recip_alphas_cumprod", "posterior_variance", "alphas_cumprod"),
            "alphas_cumprod",
            "",
        ),
    ],
)
def test_a_wrong_schedule_names_the_first_table_that_is_wrong(goldens, names, first, clue):
    class WrongTables(Fake):
        def schedule(self):
            tables = shifted(super().schedule(), *names)
            return tables | {names[0]: tables[names[0]] + 1}  # furthest off, and not the first

    result = by_id(WrongTables, goldens, "L0/*")["L0/tiny/schedule"]
    assert result.worst.output == first
    assert result.message.startswith(f"{first} is out of tolerance")
    assert result.clues[0].startswith("wrong: ")
    assert set(result.clues[0].partition(";")[0][7:].split(", ")) == set(names)
    mend = [line for line in result.clues if line.startswith(f"mend {first} first")]
    assert bool(mend) is (clue is not None)
    assert not clue or clue in mend[0]


def test_a_missing_table_is_named_where_those_before_it_are_right(goldens):
    class OnlyBetas(Fake):
        def schedule(self):
            return {"betas": super().schedule()["betas"]}

    assert verdict(OnlyBetas, goldens, "L0/tiny/schedule").message == (
        "alphas is missing from the results"
    )


REAL = Goldens()


def failed_as(case_id, *findings, clues=()):
    """A Result of a real case that failed with these findings."""
    case = case_named(REAL, case_id)
    return Result("b", "float64", case, "failed", findings=list(findings), clues=list(clues))


ROWS = "x: {} of 5 (t = 999 and 70; t_prev = {}) are wrong; the others are right"


def test_every_word_that_chooses_a_cause_stands_in_one_of_its_cases():
    for end, words in diagnose.BY_NAME:
        named = [case for case in REAL.cases if case.id.endswith(end)]
        assert named, end
        for word in words:
            assert any(word in cause for case in named for cause in case.causes), (end, word)
    tables = {cause for case in REAL.cases if case.call == "schedule" for cause in case.causes}
    for words in diagnose.BY_TABLE.values():
        for word in words:
            assert any(word in cause for cause in tables), word
    every = {cause for case in REAL.cases for cause in case.causes}
    for word in (*diagnose.IN_LOW_PRECISION, *diagnose.NOT_FINITE, *diagnose.IN_BACKWARD):
        assert any(word in cause for cause in every), word


@pytest.mark.parametrize(
    ("result", "first"),
    [
        (failed_as("L2/tiny/down_blocks.0.resnets.0"), "GroupNorm epsilon 1e-5"),
        (failed_as("L2/tiny/down_blocks.0.resnets.0_mean_100"), "one-pass variance"),
        (failed_as("L2/tiny/down_blocks.1.attentions.0_mean_100"), "one-pass variance"),
        (failed_as("L2/tiny/conv_out_mean_100"), "one-pass variance"),
        (failed_as("L2/tiny/down_blocks.1.attentions.0_sigma_0.01"), "GroupNorm epsilon 1e-5"),
        (failed_as("L4/tiny/loss_and_grads_again"), "gradients not zeroed between calls"),
        (failed_as("L4/tiny/loss_and_grads_dropped"), "dropout mask inverted"),
        (failed_as("L6/tiny/ddim_guided_0"), "a scale of 0 taken for no guidance"),
        (failed_as("L6/tiny/ddim_guided"), "guidance as label"),
        (failed_as("L6/tiny/ddim_eta"), "eta or sigma wrong"),
        (
            failed_as("L1/tiny/ddim_step_eta0", clues=[ROWS.format("rows 0 and 3", "-1 and -1")]),
            "the end taken as",
        ),
        (
            failed_as("L1/tiny/ddim_step_eta1", clues=[ROWS.format("row 1", "600")]),
            "eta ignored",
        ),
        (
            failed_as("L1/tiny/ddpm_step", clues=["x: row 2 of 5 (t = 0) is wrong; the others"]),
            "noise added at t=0",
        ),
        (
            failed_as("L1/tiny/ddpm_step", clues=["x: row 1 of 5 (t = 70) is wrong; the others"]),
            "posterior_variance and betas",
        ),
        (failed_as("L2/tiny/time_proj", clues=[diagnose.ROUNDED]), "t or the angles in low"),
        (
            failed_as("L1/tiny/predict_x0_eps", Finding("eps", "tolerance", "")),
            "eps not derived again",
        ),
        (
            failed_as("L0/tiny/ho2020", Finding("posterior_variance", "tolerance", "")),
            "a posterior table",
        ),
        (failed_as("L0/tiny/ho2020", Finding("betas", "tolerance", "")), "one beta endpoint"),
        (failed_as("L6/tiny/dpmpp", Finding("trajectory", "not finite", "")), "second order in"),
    ],
    ids=lambda value: value.case.id if isinstance(value, Result) else None,
)
def test_causes_stand_in_the_order_that_the_case_speaks_for(result, first):
    assert result.causes[0].startswith(first)
    assert sorted(result.causes) == sorted(result.case.causes)
    assert not dataclasses.replace(result, status="error").causes


def test_nan_is_counted_in_rows_and_steps(goldens):
    class NanRows(Fake):
        def q_sample(self, *args, **more):
            out = super().q_sample(*args, **more)
            out[1:, 2, 3] = np.nan
            return out

        def sample(self, *args, **more):
            steps = super().sample(*args, **more)
            steps[2:, 1, 0, 5] = np.inf
            return steps

        def schedule(self):
            tables = super().schedule()
            tables["sqrt_recip_alphas_cumprod"][-3:] = np.inf
            return tables

        def loss_and_grads(self, *args, **more):
            _, grads = super().loss_and_grads(*args, **more)
            for name in ("conv_in.bias", "conv_in.weight"):
                grads[name][1] = np.nan
            return float("nan"), grads

    results = by_id(NanRows, goldens)
    for case_id, line in {
        "L1/tiny/q_sample": "out holds NaN or infinity in 2 of 3 rows; the first at (1, 2, 3, 0)",
        "L6/digits/guided": "trajectory holds NaN or infinity in 2 of 4 steps, 1 of 2 rows; "
        "the first at (2, 1, 0, 5, 0)",
        "L0/tiny/schedule": "sqrt_recip_alphas_cumprod holds NaN or infinity in 3 of 1000 times; "
        "the first at (997,)",
        "L4/tiny/grads": "loss holds NaN or infinity; the first at ()",
    }.items():
        assert line in results[case_id].clues, results[case_id].clues
    assert "3 results hold NaN or infinity" in results["L4/tiny/grads"].clues


class ScalesInPredict(Fake):
    def __init__(self, config, params, dtype):
        super().__init__(config, params, dtype)
        self.kept = params

    def run_block(self, name, **inputs):
        self.kept["conv_in.bias"] *= 2
        return super().run_block(name, **inputs)


class PopsTheOpened(Fake):
    def __init__(self, config, params, dtype):
        super().__init__(config, params, dtype)
        params.pop("conv_in.bias")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (ScalesInPredict, "open was given params[conv_in.bias], and the model changed that array"),
        (PopsTheOpened, "open was given params, and the model took names out of that dict"),
    ],
)
def test_parameters_that_a_model_changes_are_noticed_at_the_first_case(goldens, model, text):
    class Backend:  # hands on the very dict that it is given
        name, modes = "fake", ("eager",)

        @staticmethod
        def open(config, params=None, *, seed=0, dtype="float32", device="auto", mode="eager"):
            params = initial_params(config, seed) if params is None else params
            return model(config, params, dtype)

    first = next(case for case in goldens.cases if case.call == "run_block")
    session = Session(Backend, goldens, "float64", "cpu")
    outcome = session.attempt(first)
    assert outcome.status == "fault"
    assert text in outcome.message


# --- which rows, which times ----------------------------------------------------------------------


def of_rows(rows, change):
    """A model whose results of every call are changed in these rows."""

    class Rows(Fake):
        def cast(self, value):
            value = super().cast(value)
            if isinstance(value, dict) or value.ndim < 4:
                return value
            part = (slice(None), rows) if value.ndim == 5 else rows
            value[part] = change(value[part])
            return value

    return Rows


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: 1.5 * x, lambda x: x * np.nan])
@pytest.mark.parametrize(
    ("rows", "steps", "guided"),
    [
        ([0], "row 0 of 3 (t = 0; t_prev = -1) is wrong; the others", "row 0 of 2 (labels = 1) is"),
        ([0, 1], "rows 0 and 1 of 3 (t = 0 and 400; t_prev = -1 and 200) are wrong", None),
        ([1, 2], "rows 1 and 2 of 3 (t = 400 and 999; t_prev = 200 and 998) are", None),
    ],
)
def test_the_rows_that_are_wrong_are_named_with_their_times(goldens, change, rows, steps, guided):
    results = by_id(of_rows(rows, change), goldens, "L1/tiny/ddim_step")
    (told,) = [clue for clue in results["L1/tiny/ddim_step"].clues if " of 3 (" in clue]
    assert told.startswith(f"out: {steps}")
    if guided is None:  # all rows of that case
        return
    results = by_id(of_rows(rows, change), goldens, "L6/digits/guided")
    (told,) = [clue for clue in results["L6/digits/guided"].clues if " of 2 (" in clue]
    assert told.startswith(f"trajectory: {guided}")


def test_no_rows_are_named_where_all_are_wrong_or_none_could_be_told(goldens):
    for model in (of_rows([0, 1, 2], lambda x: x + 1), of_rows([0], lambda x: x)):
        results = by_id(model, goldens, "L1/tiny/*")
        assert not any(" of 3" in clue for r in results.values() for clue in r.clues)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([0], "t = 0;"),
        ([0, 999], "t = 0 and 999;"),
        ([1, 2, 3, 5, 8, 13], "t = 1, 2, 3, 5, 8 and 13;"),
        (range(1, 1000), "999 of 1000 times, t = 1 to 999;"),
        (range(0, 20, 2), "10 of 1000 times, t = 0, 2, 4, 6, ... and 18;"),
    ],
)
@pytest.mark.parametrize("factor", [1.001, np.inf])
def test_the_times_at_which_a_table_is_wrong_are_named(goldens, times, told, factor):
    class Times(Fake):
        def schedule(self):
            tables = super().schedule()
            tables["alphas_cumprod"][list(times)] *= factor
            return tables

    result = by_id(Times, goldens, "L0/*")["L0/tiny/schedule"]
    (line,) = [clue for clue in result.clues if "is wrong at" in clue]
    assert line.startswith(f"alphas_cumprod is wrong at {told}")


def test_rows_of_a_strided_golden_are_found_where_it_is_stored():
    golden = np.random.Generator(np.random.Philox(8)).normal(size=(4, 6, 5))
    got = golden.copy()
    got[[1, 3]] += 1e-3
    finding = Finding("out", "tolerance", "", golden.shape, (Measure("l2", 1.0, 1e-10),))
    for stride in (1, 2, 7, 29):
        wrong = out_alone(finding, got, golden.reshape(-1)[::stride], stride, 0)
        assert wrong.shape == (4, 1, 1)
        assert wrong.ravel().tolist() == [False, True, False, True]


# --- what hides the golden ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: x * 1.37,
        lambda x: x + 0.25,
        lambda x: np.roll(x, 1, axis=-1) * (1 + 1e-9),
        lambda x: np.flip(x, 0).copy(),
        lambda x: x.T.copy(),
        lambda x: np.zeros_like(x),
        lambda x: np.full_like(x, np.nan),
    ],
)
def test_nothing_that_is_shown_gives_a_hidden_golden_away(goldens, change):
    class Changed(Fake):
        def cast(self, value):
            value = super().cast(value)
            return value if isinstance(value, dict) else change(value)

    session = Session(Backend(Changed), goldens, "float64", "cpu")
    seen = 0
    for case in goldens.cases:
        outcome = session.attempt(case)
        if outcome.status != "done":
            continue
        shown = judge(goldens, "fake", "float64", case, outcome)
        result = judge(goldens, "fake", "float64", case, outcome, hide=True)
        assert result.status == shown.status
        finish([result])
        for finding in result.findings:
            assert finding.expected is None
            assert finding.got is None or not np.isfinite(finding.got)
            for measure in finding.measures:
                assert measure.error == float(f"{measure.error:.0e}")
        told = "\n".join([result.message, *result.clues])
        for word in ("expected value", "opposite", "is zero", "times the", "axes in the order"):
            assert word not in told
        seen += result.status == "failed"
    assert seen > 5


def test_an_error_in_one_digit_stays_on_its_side_of_the_tolerance():
    for error in (1.01e-10, 0.99e-10, 9.99e-3, 1e-7, 3.0000001e5, 5e-324, 0.0, np.inf):
        for tolerance in (error * 1.01, error / 1.01, error):
            measure = Measure("l2", error, tolerance)
            finding = Finding("out", "tolerance", "", (), (measure,), got=1.0, expected=2.0)
            (rounded,) = hidden(finding).measures
            assert rounded.ok is measure.ok
            assert rounded.error == pytest.approx(error, rel=1, abs=1e-323)
