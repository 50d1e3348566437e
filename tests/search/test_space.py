from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest
import spaces
from hypothesis import assume, given
from hypothesis import strategies as st

from zoo.errors import SpecError, ZooError
from zoo.search.program import Decision, Point
from zoo.search.space import Space, load_space
from zoo.spec.document import dump, parse, spec_hash
from zoo.spec.template import Template

MANY = 1500
REAL = sorted(spaces.real())

LANGUAGE_MODEL = "width: {choice: [32, 64]}\nstem: {type: token, vocab: 64}\nhead: language_model\nbody:\n  layers:\n"


def valid_points(space: Space, count: int, seed: int = 0) -> list[Point]:
    rng = random.Random(seed)
    found: list[Point] = []
    while len(found) < count:
        point = space.sample(rng)
        try:
            space.spec_at(point)
        except SpecError:
            continue
        found.append(point)
    return found


@given(spaces.templates())
def test_size_is_the_number_of_points(template: Template) -> None:
    space = Space.from_template(template)
    found = list(itertools.islice(spaces.points(space), MANY + 1))
    assume(len(found) <= MANY)
    assert len({tuple(sorted(point.items(), key=str)) for point in found}) == len(found) == space.size()


@given(spaces.templates(), st.randoms(use_true_random=False))
def test_a_point_holds_what_filling_asks_for(template: Template, rng: random.Random) -> None:
    space = Space.from_template(template)
    point = space.sample(rng)
    asked: set[str] = set()

    def choose(hole: object, path: str) -> object:
        asked.add(path)
        return point[path]

    template.fill(choose)  # type: ignore[arg-type]
    assert asked == set(point)
    assert space.normalised(point) == point
    assert space.normalised({**point, "nowhere": 1}) == point


@given(spaces.templates(), st.randoms(use_true_random=False))
def test_changed_points_are_points(template: Template, rng: random.Random) -> None:
    space = Space.from_template(template)
    a, b = space.sample(rng), space.sample(rng)
    changed = space.mutate(a, rng)
    assert space.normalised(changed) == changed
    assert changed != a or space.size() == 1 or all(decision.count == 1 for decision in _active(space, a))
    child = space.cross(a, b, rng)
    assert space.normalised(child) == child
    assert space.cross(a, a, rng) == a


def _active(space: Space, point: Point) -> list:
    return [decision for decision in space.decisions if decision.name in point]


def test_sizes() -> None:
    hybrid = spaces.hybrid()
    layer = (2 * 3 * 2 + 2 + 1) * (3 + 1 + 1)
    assert hybrid.size() == 4 * sum(layer**depth for depth in range(8, 25))
    assert Space.parse("width: 32\nnorm: {type: rmsnorm, eps: {float: [1.0e-6, 1.0e-5]}}").size() is None
    assert Space.parse("width: 32").size() == 1


def test_a_shared_decision_counts_once_and_only_where_it_is_referred_to() -> None:
    layer = "{repeat: 3, of: {channel: {choice: {mlp: {type: mlp, ratio: $r}, glu: glu}}}}"
    space = Space.parse(f"vars: {{r: {{choice: [1, 2, 4]}}}}\nwidth: 32\nbody: {{layers: {layer}}}")
    assert space.size() == (2**3 - 1) * 3 + 1
    point = space.normalised({f"body.layers[{index}].channel": "glu" for index in range(3)})
    assert "r" not in point


def test_layers_are_drawn_evenly_and_lengths_by_value() -> None:
    space = spaces.hybrid()
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(400)]
    mixers = [point["body.layers[0].mixer"] for point in drawn]
    assert 0.72 < mixers.count("attention") / len(mixers) < 0.88
    depths = [point["body.layers.repeat"] for point in drawn]
    assert set(depths) == set(range(8, 25))
    assert 14 < sum(map(int, depths)) / len(depths) < 18  # type: ignore[arg-type]


def test_decisions_know_when_they_are_open() -> None:
    (heads,) = [d for d in spaces.hybrid().decisions if d.name == "body.layers[20].mixer.attention.heads"]
    assert heads.labels == (4, 8)
    assert dict(heads.conditions) == {
        "body.layers.repeat": (21, 22, 23, 24),
        "body.layers[20].mixer": ("attention",),
    }


@pytest.mark.parametrize("name", REAL)
def test_specs_of_points(name: str) -> None:
    space = spaces.real()[name]
    for point in valid_points(space, 5):
        spec = space.spec_at(point)
        assert spec_hash(spec) == spec_hash(space.spec_at({**point, "nowhere": 1}))


def test_points_outside_of_the_space() -> None:
    space = spaces.hybrid()
    point = space.first()
    with pytest.raises(ZooError, match="no value for 'width'"):
        space.spec_at({})
    with pytest.raises(ZooError, match="expected one of 256, 384, 512, 768; got 300"):
        space.spec_at({**point, "width": 300})
    with pytest.raises(ZooError, match="from 8 to 24; got 25"):
        space.spec_at({**point, "body.layers.repeat": 25})
    assert space.normalised({**point, "width": 300, "body.layers.repeat": 8.0}) == point


def test_combinations_that_are_invalid_say_where() -> None:
    space = spaces.real()["shared"]
    with pytest.raises(SpecError, match=r"shared.yaml:13:\d+: body.layers\[0\].mixer.heads: heads 3 does not divide"):
        space.spec_at({**space.first(), "heads": 3})


def test_keys_are_stable_and_tell_points_apart() -> None:
    space = spaces.hybrid()
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(100)]
    keys = [space.key(point) for point in drawn]
    assert len(set(keys)) == len({tuple(point.items()) for point in drawn})
    assert keys == [space.key({**dict(reversed(point.items())), "nowhere": 1}) for point in drawn]
    code = "import sys, random; sys.path.insert(0, 'tests/search'); import spaces; s = spaces.hybrid(); "
    code += "print(s.key(s.sample(random.Random(0))), s.hash)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [keys[0], space.hash]


def test_the_hash_is_that_of_what_is_open_and_fixed() -> None:
    text = spaces.HYBRID.read_text()
    same = Space.parse(text.replace("name: hybrid", "# a remark\nname: other"))
    assert same.hash == spaces.hybrid().hash
    for old, new in (("[256, 384", "[128, 384"), ("[8, 24]", "[8, 23]"), ("8192", "4096"), ("mlp: mlp", "mlp: glu")):
        assert Space.parse(text.replace(old, new)).hash != same.hash


def test_baselines_take_one_mixer_everywhere() -> None:
    found = spaces.hybrid().homogeneous()
    assert list(found) == ["attention", "mamba2", "linear_attention"]
    for name, point in found.items():
        mixers = {value for key, value in point.items() if key.endswith(".mixer")}
        assert mixers == {name}
        assert (point["width"], point["body.layers.repeat"]) == (384, 16)


def test_baselines_without_mixers_take_one_channel_mixer() -> None:
    space = Space.parse(LANGUAGE_MODEL + "    repeat: 2\n    of: {mixer: attention, channel: {choice: [mlp, glu]}}")
    assert list(space.homogeneous()) == ["mlp", "glu"]
    assert Space.parse("width: {choice: [32, 64]}").homogeneous() == {}


def test_equal_holes_of_one_name_are_one_decision_and_different_ones_are_refused() -> None:
    layers = "    - {channel: {type: mlp, ratio: {choice: [1, 2], name: r}}}\n"
    assert Space.parse(LANGUAGE_MODEL + layers * 2).size() == 2 * 2
    with pytest.raises(SpecError, match="two different holes are called 'r'"):
        Space.parse(LANGUAGE_MODEL + layers + layers.replace("[1, 2]", "[1, 4]"))


def test_values_that_look_alike_are_refused() -> None:
    with pytest.raises(SpecError, match="values such as 1 and True look alike"):
        Space.parse("width: 32\nhead: {type: language_model, tied: {choice: [1, true]}}")


@pytest.mark.parametrize("name", REAL)
def test_real_spaces_are_valid(name: str) -> None:
    spaces.real()[name].validate()


def test_every_wrong_option_is_reported_once_with_its_place() -> None:
    text = spaces.HYBRID.read_text()
    for old, new in (
        ("[64, 128]", "[64, many]"),
        ("linear_attention: linear_attention", "linear_attention: linear_atention"),
        ("ratio:", "ratoi:"),
        ("256, 384", "-1, 384"),
    ):
        text = text.replace(old, new)
    with pytest.raises(SpecError) as caught:
        Space.parse(text, "wrong.yaml").validate()
    messages = [str(problem).splitlines()[0] for problem in caught.value.problems]
    assert len(messages) == 4
    for message, expected in zip(
        messages, ["wrong.yaml:3:18: width", "expected a valid integer", "did you mean 'linear_attention'", "'ratoi'"]
    ):
        assert expected in message


def test_an_option_that_fits_only_some_company_is_right() -> None:
    layers = "    repeat: 2\n    of: {mixer: {type: attention, heads: {choice: [4, 3]}}}"
    Space.parse(LANGUAGE_MODEL.replace("[32, 64]", "[32, 48]") + layers).validate()
    with pytest.raises(SpecError, match="heads 3 does not divide"):
        Space.parse(LANGUAGE_MODEL + layers).validate()


def test_what_is_wrong_everywhere_is_reported() -> None:
    with pytest.raises(SpecError, match="unknown stem 'tokn'; did you mean 'token'"):
        Space.parse(spaces.HYBRID.read_text().replace("type: token", "type: tokn")).validate()


@pytest.mark.parametrize("name", REAL)
def test_points_of_specs(name: str) -> None:
    space = spaces.real()[name]
    for point in valid_points(space, 8, seed=1):
        spec = space.spec_at(point)
        found = space.point_of(parse(dump(spec)))
        assert spec_hash(space.spec_at(found)) == spec_hash(spec)
        assert space.normalised(found) == found


def test_points_with_real_values() -> None:
    layers = "    repeat: {int: [1, 3]}\n    of: {channel: {type: glu, ratio: {float: [1, 4]}}}\n"
    norm = "norm: {type: rmsnorm, eps: {float: [1.0e-6, 1.0e-4], log: true}}\n"
    space = Space.parse(norm + LANGUAGE_MODEL + layers)
    for point in valid_points(space, 5):
        spec = space.spec_at(point)
        found = space.point_of(spec)
        assert spec_hash(space.spec_at(found)) == spec_hash(spec)
        assert found["norm.eps"] == point["norm.eps"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 256", "width: 320", "width: the space has 256, 384, 512 or 768, the spec 320"),
        ("vocab: 8192", "vocab: 100", "stem.vocab: the space has 8192, the spec 100"),
        ("head: language_model", "head: {type: language_model, tied: false}", "head.tied: the space gives True, the"),
        ("mlp", "moe", "channel: the space has 'glu', 'mlp' or 'matformer', the spec 'moe'"),
        ("ratio: 2}", "hidden: 520}", r"channel.hidden: the space gives \d+, the spec 520"),
        ("repeat: 8", "repeat: 7", "body.layers: the spec has 7 layers, the space from 8 to 24"),
    ],
)
def test_a_spec_outside_of_the_space_says_where_it_differs(old: str, new: str, message: str) -> None:
    text = (
        "width: 256\nstem: {type: token, vocab: 8192}\nhead: language_model\nbody:\n  layers:\n    repeat: 8\n    of:\n"
        "      - {mixer: linear_attention, channel: {type: glu, ratio: 2}}\n"
    )
    text = text.replace("{type: glu, ratio: 2}", "mlp") if old == "mlp" else text
    assert old in text
    spaces.hybrid().point_of(parse(text))
    with pytest.raises(ZooError, match=message):
        spaces.hybrid().point_of(parse(text.replace(old, new)))


def test_a_spec_is_a_space_of_one_point() -> None:
    space = load_space("gpt2")
    assert (space.size(), space.decisions, space.first(), space.homogeneous()) == (1, (), {}, {})
    assert space.point_of(space.spec_at({})) == {}
    assert space.mutate({}, random.Random(0)) == {}


def test_wide_ranges_are_never_written_out() -> None:
    layers = "    repeat: 2\n    of: {channel: {type: mlp, hidden: {int: [1, 1_000_000]}}}\n"
    space = Space.parse(LANGUAGE_MODEL + layers)
    assert space.size() == 2 * 10**12
    point = valid_points(space, 1)[0]
    assert space.point_of(space.spec_at(point)) == point
    space.validate()


@pytest.mark.parametrize("log", [False, True])
def test_a_real_number_moves_nearby_and_stays_real(log: bool) -> None:
    decision, rng = Decision("rate", "float", low=0.25, high=0.75, log=log), random.Random(0)
    found = [decision.other(0.5, rng) for _ in range(50)]
    assert all(isinstance(value, float) and 0.25 <= value <= 0.75 and value != 0.5 for value in found)
    assert len(set(found)) > 40
