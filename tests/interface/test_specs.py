"""A table of specs that parse and one of specs that do not; nothing but `CachekitError` is raised."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cachekit
from cachekit import (
    CachekitError,
    Choice,
    Every,
    Kind,
    Mask,
    Policy,
    PolicyError,
    Reuse,
    Schedule,
    Sites,
    SpecError,
    StandIn,
    Where,
    WholeDenoiser,
    Window,
)
from cachekit.interface.policy import PARTS
from cachekit.interface.specs import is_name, parse, parse_all
from cachekit.registry.catalog import installed

WORDS = installed()
Cache = WORDS.policies["cache"]

# Spec -> its canonical form.
VALID = {
    "tgate": "tgate",
    "tgate:m=10": "tgate",
    "deepcache:end=none": "deepcache",
    "tgate:m=5": "tgate:m=5",
    "tgate:m=auto,mean=true": "tgate:m=auto",
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
    "forecast:interval=3,order=2,of=residual": "forecast:interval=3,order=2,of=residual",
    # Parts: keys in brackets, a value without a key, lists, kinds of sites as bare words.
    "cache:where=denoiser,when=every,what=reuse": "cache:where=denoiser",
    "cache:where=denoiser(),when=every()": "cache:where=denoiser",
    "cache:where=denoiser,when=every(3)": "cache:where=denoiser,when=every(n=3)",
    "cache:where=denoiser,when=every(3,first=2)": "cache:where=denoiser,when=every(n=3,first=2)",
    " cache : where = denoiser , when = every ( first = 2 , n = 3 ) ": "cache:where=denoiser,when=every(n=3,first=2)",
    "cache:what=taylor(2,of=x0),where=denoiser": "cache:where=denoiser,what=taylor(of=x0,order=2)",
    "cache:where=cross_attention": "cache:where=cross_attention",
    "cache:where=sites(cross_attention)": "cache:where=cross_attention",
    "cache:where=sites(feed_forward;block)": "cache:where=sites(feed_forward;block)",
    "cache:where=span( first=-2 )": "cache:where=span(first=-2)",
    "cache:where=region(1)": "cache:where=region(branch=1)",
    "cache:where=guidance(uncond),what=linear(of=residual)": (
        "cache:where=guidance(keep=uncond),what=linear(of=residual)"
    ),
    "cache:where=denoiser,when=mask(0; 1 ;4)": "cache:where=denoiser,when=mask(steps=0;1;4)",
    "cache:where=denoiser,when=window(low=0.5,stop=9,when=window(when=every(3)))": (
        "cache:where=denoiser,when=window(stop=9,low=0.5,when=window(when=every(n=3)))"
    ),
    # The parts of a policy with one choice can be replaced; they stand last.
    "deepcache:what=linear,interval=5": "deepcache:interval=5,what=linear",
    "deepcache:interval=3,what=linear": "deepcache:what=linear",
    "deepcache:when=none": "deepcache",
    "forecast:when=mask(0;3),what=hermite(2)": "forecast:when=mask(steps=0;3),what=hermite(order=2)",
    "adaptive_guidance:m=5,where=guidance(uncond)": "adaptive_guidance:m=5,where=guidance(keep=uncond)",
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
    # What is wrong within a part is named by its path.
    "cache": ("where is needed; give where=...",),
    "cache:where=denoiser,when=every(3": ("a bracket of 'where=denoiser,when=every(3' is not closed",),
    "cache:where=denoiser,when=every3)": ("is not opened",),
    "cache:where=denoiser,when=every(3))": ("is not opened",),
    "cache:where=denoiser,when=)every(": ("is not opened",),
    "cache:where=denoiser,when=every(3)x": ("when: 'x' follows the bracket; write every(key=value)",),
    "cache:where=denoiser,when=every(3)(4)": ("when=every: a bracket of '3)(4' is not opened",),
    "cache:where=denoiser,when=(3)": ("when: unknown word ''; known: after, every,",),
    "cache:where=denoiser,when=evry(3)": ("when: unknown word 'evry' (did you mean 'every'?); known: after, every,",),
    "cache:where=denoiser,when=window(when=evry(3))": ("when=window.when: unknown word 'evry'", "'every'?"),
    "cache:where=denoiser,when=window(when=every(0))": ("when=window.when=every: n=0: ", "greater than or equal to 1"),
    "cache:where=denoiser,when=every(n=3,n=4)": ("when=every: key 'n' is given twice; keep one of them",),
    "cache:where=denoiser,when=every(3,n=4)": ("when=every: key 'n' is given twice",),
    "cache:where=denoiser,when=every(3,4)": ("when=every: '4' is not key=value",),
    "cache:where=denoiser,when=every(3,)": ("when=every: '' is not key=value",),
    "cache:where=denoiser,when=every(m=3)": ("when=every: unknown key 'm'", "allowed: n, first, last, start"),
    "cache:where=denoiser,when=every(1;2)": ("when=every: n=1;2: ", "valid integer"),
    "cache:where=denoiser,when=window(3)": ("when=window: '3' is not key=value",),
    "cache:where=denoiser,when=mask": ("when=mask: steps is needed; give steps=...",),
    "cache:where=denoiser,when=mask(1;0)": ("when=mask: give steps from 0 on, each once and in order",),
    "cache:where=denoiser,when=mask(0;x)": ("when=mask: steps.1=x: ", "valid integer"),
    "cache:where=denoiser,when=mask(0;;1)": ("when=mask.steps: an item of the list '0;;1' is empty",),
    "cache:where=denoiser,when=mask(;)": ("when=mask: ", "at least 1 item"),
    "cache:where=denoiser,when=none": ("when: unknown word 'none'",),
    "cache:where=denoiser,when=linear": ("when: unknown word 'linear'", "known: after, every"),
    "cache:where=cros_attention": ("where: unknown word 'cros_attention' (did you mean 'cross_attention'?)",),
    "cache:where=cross_attention(3)": ("where: 'cross_attention' has no keys; write it without a bracket",),
    "cache:where=sites(guidance)": ("where=sites: ", "guidance is no kind of site", "write where=guidance"),
    "cache:where=sites(denoiser;block)": ("write where=denoiser",),
    "cache:where=denoiser,what=chebyshev(4,ridge=nan)": ("what=chebyshev: ridge=nan: ", "finite"),
    "cache:where=denoiser,what=drop(reuse)": ("what=drop: 'reuse' is not key=value",),
    "deepcache:interval=3(4)": ("interval=3(4): ", "valid integer"),
    "deepcache:interval(4)": ("'interval(4)' is not key=value",),
    # A part cannot be replaced where several choices have one.
    "cache:where=denoiser,what=calibrated(of=residual)": ("what=calibrated: of=residual: Input should be 'output'",),
    "cache:where=denoiser,what=chebyshev(axis=sigma)": ("what=chebyshev: axis=sigma: Input should be 'step'",),
    "tgate:m=5,what=linear": ("tgate has 2 choices (cross_attention, guidance)", "what= could mean any of them"),
    "tgate:m=5,sp_interval=2,when=every(n=3)": ("tgate has 3 choices", "when= could mean any of them; leave it out"),
    "delta_dit:where=denoiser": ("delta_dit has 2 choices (back, front)", "where= could mean any"),
}


@pytest.mark.parametrize("spec", VALID)
def test_valid_spec_has_a_canonical_form_that_parses_back(spec):
    policy = parse(spec, WORDS)
    assert str(policy) == VALID[spec]
    assert parse(str(policy), WORDS) == policy
    assert hash(parse(str(policy), WORDS)) == hash(policy)


@pytest.mark.parametrize("spec", INVALID)
def test_an_invalid_spec_is_an_error_of_one_line_with_spec_cause_and_remedy(spec):
    with pytest.raises(CachekitError) as caught:
        parse(spec, WORDS)
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
        ([WORDS.policies["tgate"]], ("give a string or a policy",)),
        ([b"tgate"], ("is a bytes",)),
        (WORDS.policies["tgate"], ("is a class, not an instance; write Tgate()", "give a spec or a list of specs")),
        ({"tgate": 5}, ("is a dict", "give a spec or a list of specs")),
        (WORDS.policies["tgate"](what=WORDS.stand_ins["linear"]()), ("spec 'tgate:what=linear': tgate has 2 choices",)),
    ],
)
def test_invalid_lists(specs, expected):
    with pytest.raises(SpecError) as caught:
        parse_all(specs, WORDS)
    assert len(str(caught.value).splitlines()) == 1
    for part in expected:
        assert part in str(caught.value)


def test_one_spec_or_several_strings_or_policies():
    tgate = WORDS.policies["tgate"](m=5)
    assert parse_all("tgate:m=5", WORDS) == parse_all([tgate], WORDS) == parse_all(tgate, WORDS) == (tgate,)
    assert [policy.name for policy in parse_all(("deepcache", tgate), WORDS)] == ["deepcache", "tgate"]


def test_a_policy_is_frozen():
    tgate = WORDS.policies["tgate"](m=5)
    with pytest.raises(ValueError, match="frozen"):
        tgate.m = 6


def test_no_policies_at_all():
    with pytest.raises(SpecError, match="unknown policy 'tgate'; known: none"):
        parse("tgate", only())


def only(**policies):
    """Make the installed catalog with these policies alone."""
    return dataclasses.replace(WORDS, policies=policies)


class EveryType(Policy):
    """A field of each type that a third party may use."""

    name: ClassVar[str] = "every_type"
    count: int = 1
    share: float = 0.5
    on: bool = True
    place: Kind = Kind.BLOCK
    maybe: int | None = None
    word: str = "x"
    numbers: tuple[int, ...] = (1,)
    schedules: tuple[Schedule, ...] = ()
    nested: Every | None = None

    def choices(self):
        return {"denoiser": Choice(WholeDenoiser(), Every(n=2), Reuse())}


def parts(classes, depth=1):
    """Generate parts of these classes from their fields: types, bounds and choices are read from the fields."""
    made = [
        st.builds(part, **fields(part, depth)) for name, part in sorted(classes.items()) if name not in OF_THEIR_OWN
    ]
    return st.one_of(*made, *(OF_THEIR_OWN[name](depth) for name in sorted(classes) if name in OF_THEIR_OWN))


def fields(part, depth):
    return {key: values(field.annotation, field.metadata, depth) for key, field in part.model_fields.items()}


def values(annotation, bounds, depth):
    low, high = (
        next((getattr(bound, sign) for bound in bounds for sign in signs if hasattr(bound, sign)), None)
        for signs in (("ge", "gt"), ("le", "lt"))
    )
    if type(None) in get_args(annotation):
        inner = (one for one in get_args(annotation) if one is not type(None))
        return st.one_of(st.none(), *(values(one, bounds, depth) for one in inner))
    if get_origin(annotation) is Union:
        return st.one_of(*(values(one, bounds, depth) for one in get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return values(annotation.__origin__, annotation.__metadata__[0].metadata, depth)
    if get_origin(annotation) is tuple:
        least, most = (next((getattr(bound, key) for bound in bounds if hasattr(bound, key)), None) for key in _SIZES)
        return st.lists(values(get_args(annotation)[0], (), depth), min_size=least or 0, max_size=most).map(tuple)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is int:
        return st.integers(low, high)
    if annotation is float:
        is_open = any(hasattr(bound, "gt") for bound in bounds)
        return st.floats(low, high, exclude_min=is_open, allow_nan=False, allow_infinity=False)
    if annotation is Schedule:
        return parts(WORDS.schedules, depth - 1) if depth else st.builds(Every)
    if annotation is str:
        return st.from_regex(r"[a-z./_]+", fullmatch=True).filter(lambda word: word != "none")
    if annotation is bool:
        return st.booleans()
    return parts({Where: WORDS.places, StandIn: WORDS.stand_ins}[annotation])


#: The bounds of how many items a list has.
_SIZES = ("min_length", "max_length")
#: Parts with rules between or within fields.
OF_THEIR_OWN = {
    "mask": lambda depth: st.sets(st.integers(0, 10**9), min_size=1).map(
        lambda steps: Mask(steps=tuple(sorted(steps)))
    ),
    "sites": lambda depth: st.lists(st.sampled_from(list(Sites.spellings())), min_size=1).map(
        lambda kinds: Sites(kinds=tuple(kinds))
    ),
}
RULES = {
    "calibrated": lambda given: given["interval"] is not None,
    "adaptive_guidance": lambda given: given["m"] is None or given["threshold"] is None,
    "delta_dit": lambda given: (
        (given["first"], given["stop"]) == (None, None) or (given["blocks"], given["boundary"]) == (None, None)
    ),
    "magcache": lambda given: given["ratios"] is None or given["file"] is None,
    "null_text": lambda given: (given["after"], given["before"]) != (None, None),
    "pab": lambda given: given["low"] < given["high"],
    "guidance_interval": lambda given: (
        (given["stop"] is None or given["first"] < given["stop"])
        and (None in (given["low"], given["high"]) or given["low"] < given["high"])
        and (given["axis"] == "noise" or (given["low"], given["high"]) != (None, None))
    ),
    "teacache": lambda given: given["file"] is None,
}


@pytest.mark.parametrize("name", sorted(WORDS.policies))
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_installed_policy_parses_back_whatever_its_keys_are(name, data):
    policy = WORDS.policies[name]
    own = {key: field for key, field in policy.model_fields.items() if name == "cache" or key not in PARTS}
    keys = {key: values(field.annotation, field.metadata, 1) for key, field in own.items()}
    made = policy(**data.draw(st.fixed_dictionaries(keys).filter(RULES.get(name, lambda given: True))))
    if len(made.choices()) == 1 and name != "cache":
        replaced = {"where": WORDS.places, "when": WORDS.schedules, "what": WORDS.stand_ins}
        optional = {key: st.none() | parts(found) for key, found in replaced.items()}
        made = policy(**{**dict(made), **data.draw(st.fixed_dictionaries(optional))})
    assert parse(str(made), WORDS) == made
    assert str(parse(str(made), WORDS)) == str(made)


@pytest.mark.parametrize(
    ("key", "found"), [("where", WORDS.places), ("when", WORDS.schedules), ("what", WORDS.stand_ins)]
)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_part_parses_back_whatever_its_keys_are(key, found, data):
    part = data.draw(parts(found, depth=3))
    policy = parse(
        ",".join({"where": "cache:where=denoiser", key: f"{'cache:' * (key == 'where')}{key}={part}"}.values()), WORDS
    )
    assert getattr(policy, key) == part
    assert parse(str(policy), WORDS) == policy


VALUES = {
    "count": st.integers(),
    "share": st.floats(allow_nan=False, allow_infinity=False),
    "on": st.booleans(),
    "place": st.sampled_from(Kind),
    "maybe": st.none() | st.integers(),
    "word": st.from_regex(r"[a-z_.]+", fullmatch=True),
    "numbers": st.lists(st.integers()).map(tuple),
    "schedules": st.lists(parts(WORDS.schedules)).map(tuple),
    "nested": st.none() | st.builds(Every, n=st.integers(1, 9)),
}


@given(st.fixed_dictionaries(VALUES))
@settings(max_examples=100, deadline=None)
def test_canonical_form_parses_back(values):
    policy = EveryType(**values)
    assert parse(str(policy), only(every_type=EveryType)) == policy


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Cache(where=WholeDenoiser),
            "Cache: where is the class WholeDenoiser, not an instance; write WholeDenoiser()",
        ),
        (lambda: Window(when=Every), "Window: when is the class Every, not an instance; write Every()"),
        (lambda: WORDS.policies["tgate"](m=0), "Tgate: m=0: Input should be greater than or equal to 1"),
        (lambda: WORDS.policies["tgate"](m="a\nb"), "Tgate: m=a\\nb: Input should be a valid integer"),
        (lambda: Mask(), "Mask: steps is needed; give steps=..."),
        (lambda: Every(k=3), "Every: k=3: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_in_python_is_one_line_too(make, said):
    with pytest.raises(SpecError) as caught:
        make()
    assert str(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1


class Chosen(Policy):
    """A policy whose choices are whatever it is given."""

    name: ClassVar[str] = "chosen"
    given_choices: ClassVar[Any] = None

    def choices(self):
        return self.given_choices() if callable(self.given_choices) else self.given_choices


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (None, "choices returned None; return at least one Choice, by name"),
        ({}, "choices returned {}; return at least one Choice"),
        ([Choice(WholeDenoiser(), Every(n=2), Reuse())], "return at least one Choice, by name"),
        ({"a": Reuse()}, "the choice 'a' is Reuse(of='output'); make it a Choice"),
        (
            {"a": Choice(WholeDenoiser, Every(n=2), Reuse())},
            "the choice 'a' has the class WholeDenoiser as where; write",
        ),
        ({"a": Choice(WholeDenoiser(), Every, Reuse())}, "the choice 'a' has the class Every as when; write Every()"),
        ({"a": Choice(WholeDenoiser(), Every(n=2), "reuse")}, "'reuse' as what; give an instance of StandIn"),
        ({"a": Choice(WholeDenoiser(), Every(n=2), Reuse(), "mean")}, "'mean' as change; give an instance of"),
        (lambda: 1 / 0, "choices raised ZeroDivisionError: division by zero"),
    ],
)
def test_choices_that_cannot_be_used_are_named(choices, said):
    class Wrong(Chosen):
        given_choices: ClassVar[Any] = staticmethod(choices) if callable(choices) else choices

    with pytest.raises(PolicyError) as caught:
        parse("chosen", only(chosen=Wrong))
    assert str(caught.value).startswith("chosen: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:Field name:UserWarning")
@pytest.mark.parametrize(
    ("base", "key"),
    [
        (Policy, "choices"),
        (Policy, "caution"),
        (Policy, "given"),
        (Policy, "copy"),
        (Every, "full"),
        (Reuse, "entries"),
    ],
)
def test_a_field_that_shadows_a_method_is_one_line(base, key):
    """Its value would take the place of the method, or be lost behind a property."""
    with pytest.raises(PolicyError) as caught:
        type("Odd", (base,), {"__annotations__": {key: int}, key: 3, "__module__": __name__})
    assert str(caught.value) == f"Odd.{key} is a field with the name of a method; rename it"


VOCABULARY = {**WORDS.policies, **WORDS.places, **WORDS.schedules, **WORDS.stand_ins}
FRAGMENTS = st.sampled_from(
    [
        *VOCABULARY,
        *sorted({key for part in VOCABULARY.values() for key in part.model_fields}),
        *":=,., \n-;()",
        "0",
        "5",
        "cond",
    ]
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
@settings(max_examples=200, deadline=None)
def test_any_of_ten_thousand_strings_parses_or_is_a_line(texts):
    for text in texts:
        line = ""
        try:
            policy = parse(text, WORDS)
        except CachekitError as error:
            line = str(error)
        assert line or parse(str(policy), WORDS) == policy
        assert len(line.splitlines()) <= 1


@pytest.mark.parametrize(("name", "fine"), [("tgate", True), ("a_1", True), ("", False), ("A", False), ("a-b", False)])
def test_names(name, fine):
    assert is_name(name) is fine


def test_listing_is_sorted_and_public():
    assert list(cachekit.policies()) == sorted(WORDS.policies)
    assert list(cachekit.adapters()) == sorted(installed().adapters)
