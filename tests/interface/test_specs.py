"""A table of specs that parse and one of specs that do not; nothing but `CachekitError` is raised."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cachekit
from cachekit import CachekitError, Kind, Policy
from cachekit.errors import SpecError
from cachekit.interface.specs import is_name, parse, parse_all
from cachekit.registry.catalog import installed

WORDS = installed()

# Spec -> its canonical form.
VALID = {
    "tgate": "tgate",
    "tgate:m=10": "tgate",
    "deepcache:end=none": "deepcache",
    "tgate:m=5": "tgate:m=5",
    "tgate:keep=cond,m=5": "tgate:m=5,keep=cond",
    " tgate : m = 5 , keep = auto ": "tgate:m=5",
    "tgate:m=007": "tgate:m=7",
    "tgate:sp_interval=5,fi_interval=2,warm_up=2": "tgate:sp_interval=5,fi_interval=2,warm_up=2",
    "cair:n=5": "cair:n=5",
    "deepcache": "deepcache",
    "deepcache:interval=3,branch=0": "deepcache",
    "deepcache:branch=1,interval=5": "deepcache:interval=5,branch=1",
    "deepcache:schedule=quadratic,center=20,power=1.5": "deepcache:schedule=quadratic,center=20,power=1.5",
    "deepcache:power=2.5e-1": "deepcache:power=0.25",
    "deepcache:start=2,end=40": "deepcache:start=2,end=40",
    "adaptive_guidance": "adaptive_guidance",
    "adaptive_guidance:m=12,linear=yes": "adaptive_guidance:m=12,linear=true",
    "adaptive_guidance:threshold=0.9991,space=x0,every=2": "adaptive_guidance:threshold=0.9991,space=x0,every=2",
    "null_text:after=10": "null_text:after=10",
    "null_text:before=5,after=10": "null_text:after=10,before=5",
}

# Spec -> what the error must contain besides the spec: the part that is wrong, and what to do.
INVALID = {
    "tgat": ("unknown policy 'tgat'", "did you mean 'tgate'?", "known: ", "deepcache"),
    "Tgate:m=5": ("unknown policy 'Tgate'", "did you mean 'tgate'?"),
    "deep_cache:interval=3": ("did you mean 'deepcache'?",),
    "zzz": ("unknown policy 'zzz'", "known: adaptive_guidance, "),
    "": ("unknown policy ''", "known: "),
    "   ": ("unknown policy ''",),
    ":": ("unknown policy ''",),
    "=": ("unknown policy '='",),
    "tgate,deepcache": ("unknown policy 'tgate,deepcache'",),
    "tgáte": ("unknown policy",),
    "tgate\x00": ("unknown policy",),
    "🐱:m=5": ("unknown policy '🐱'",),
    "tgate:": ("nothing after ':'", "'tgate:key=value'"),
    "tgate: ": ("nothing after ':'",),
    "tgate:m": ("'m' is not key=value",),
    "tgate:=5": ("'=5' is not key=value",),
    "tgate:m=": ("'m=' is not key=value",),
    "tgate:m=5,": ("'' is not key=value",),
    "tgate:,m=5": ("'' is not key=value",),
    "tgate:m=5;keep=cond": ("m=5;keep=cond: ", "valid integer"),
    "tgate:m=5,m=5": ("key 'm' is given twice", "keep one of them"),
    "tgate:M=5": ("unknown key 'M'", "allowed: m, sp_interval, fi_interval, warm_up, keep"),
    "tgate:warmup=2": ("unknown key 'warmup'", "did you mean 'warm_up'?"),
    "tgate:name=x": ("unknown key 'name'",),
    "tgate:model_config=x": ("unknown key 'model_config'",),
    "deepcache:intervall=3": ("unknown key 'intervall'", "did you mean 'interval'?", "allowed: interval, branch"),
    "tgate:m=ten": ("m=ten: ", "valid integer"),
    "tgate:m=2.5": ("m=2.5: ", "valid integer"),
    "tgate:m=5 5": ("m=5 5: ", "valid integer"),
    "tgate:m=1\n2": ("m=1\\n2: ", "valid integer"),
    "tgate:m=1\u20282": ("valid integer",),
    "tgate:m=0": ("m=0: ", "greater than or equal to 1"),
    "tgate:m=-3": ("m=-3: ", "greater than or equal to 1"),
    "tgate:keep=both": ("keep=both: ", "'auto', 'cond' or 'uncond'"),
    "deepcache:interval=0": ("interval=0: ", "greater than or equal to 1"),
    "deepcache:power=0": ("power=0: ", "greater than or equal to 0.1"),
    "deepcache:power=11": ("power=11: ", "less than or equal to 10"),
    "deepcache:power=nan": ("power=nan: ", "finite"),
    "deepcache:power=inf": ("power=inf: ", "finite"),
    "adaptive_guidance:threshold=1.5": ("threshold=1.5: ", "less than or equal to 1"),
    "adaptive_guidance:linear=perhaps": ("linear=perhaps: ", "valid boolean"),
    "adaptive_guidance:m=5,threshold=0.9": ("m and threshold exclude each other", "give one of them"),
    "null_text": ("give after=m, before=m or both",),
}


@pytest.mark.parametrize("spec", VALID)
def test_valid_spec_has_a_canonical_form_that_parses_back(spec):
    policy = parse(spec, POLICIES)
    assert str(policy) == VALID[spec]
    assert parse(str(policy), POLICIES) == policy
    assert hash(parse(str(policy), POLICIES)) == hash(policy)


@pytest.mark.parametrize("spec", INVALID)
def test_an_invalid_spec_is_an_error_of_one_line_with_spec_cause_and_remedy(spec):
    with pytest.raises(CachekitError) as caught:
        parse(spec, POLICIES)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"spec {spec!r}: ")
    for part in INVALID[spec]:
        assert part in line


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["tgate", "tgate:m=5"], ("'tgate' is given twice", "'tgate:m=5'", "keep one of them")),
        (["tgate", 5], ("spec 5: is a int", "give a string or a policy")),
        ([None], ("spec None: is a NoneType",)),
        ([POLICIES["tgate"]], ("give a string or a policy",)),
        ([b"tgate"], ("is a bytes",)),
    ],
)
def test_invalid_lists(specs, expected):
    with pytest.raises(SpecError) as caught:
        parse_all(specs, POLICIES)
    assert len(str(caught.value).splitlines()) == 1
    for part in expected:
        assert part in str(caught.value)


def test_one_spec_or_several_strings_or_policies():
    tgate = POLICIES["tgate"](m=5)
    assert parse_all("tgate:m=5", POLICIES) == parse_all([tgate], POLICIES) == parse_all(tgate, POLICIES) == (tgate,)
    assert [policy.name for policy in parse_all(("deepcache", tgate), POLICIES)] == ["deepcache", "tgate"]


def test_a_policy_is_frozen():
    tgate = POLICIES["tgate"](m=5)
    with pytest.raises(ValueError, match="frozen"):
        tgate.m = 6


def test_no_policies_at_all():
    with pytest.raises(SpecError, match="unknown policy 'tgate'; known: none"):
        parse("tgate", {})


class Every(Policy):
    """A field of each type that a third party may use."""

    name: ClassVar[str] = "every"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.BLOCK})
    count: int = 1
    share: float = 0.5
    on: bool = True
    place: Kind = Kind.BLOCK
    maybe: int | None = None
    word: str = "x"


VALUES = {
    "count": st.integers(),
    "share": st.floats(allow_nan=False, allow_infinity=False),
    "on": st.booleans(),
    "place": st.sampled_from(Kind),
    "maybe": st.none() | st.integers(),
    "word": st.from_regex(r"[a-z_.]+", fullmatch=True),
}


@given(st.fixed_dictionaries(VALUES))
@settings(max_examples=100, deadline=None)
def test_canonical_form_parses_back(values):
    policy = Every(**values)
    assert parse(str(policy), {"every": Every}) == policy


FRAGMENTS = st.sampled_from(
    [*POLICIES, *{key for policy in POLICIES.values() for key in policy.model_fields}, *":=,., \n-", "0", "5", "cond"]
)


def changed(text, edits):
    """Replace stretches of `text`: each edit is (place, number of characters, replacement)."""
    for place, count, new in edits:
        place %= len(text) + 1
        text = text[:place] + new + text[place + count :]
    return text


EDITS = st.tuples(st.integers(0, 60), st.integers(0, 3), FRAGMENTS | st.characters())
NEARLY_VALID = st.builds(changed, st.sampled_from(list(VALID)), st.lists(EDITS, min_size=1, max_size=3))
ANY = st.text() | st.lists(FRAGMENTS, max_size=9).map("".join) | NEARLY_VALID


@given(st.lists(ANY, min_size=20, max_size=20))
@example(["tgate:m=1\n2", "tgate:m=" + "9" * 5000])
@settings(max_examples=500, deadline=None)
def test_any_of_ten_thousand_strings_parses_or_is_a_line(texts):
    for text in texts:
        line = ""
        try:
            policy = parse(text, POLICIES)
        except CachekitError as error:
            line = str(error)
        assert line or parse(str(policy), POLICIES) == policy
        assert len(line.splitlines()) <= 1


@pytest.mark.parametrize(("name", "fine"), [("tgate", True), ("a_1", True), ("", False), ("A", False), ("a-b", False)])
def test_names(name, fine):
    assert is_name(name) is fine


def test_listing_is_sorted_and_public():
    assert list(cachekit.policies()) == sorted(POLICIES)
    assert list(cachekit.adapters()) == sorted(installed().adapters)
