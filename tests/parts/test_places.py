"""Places on a toy map of sites: what they find, and the line that says what they looked for."""

from __future__ import annotations

import pytest
from support.scripted import TOY

from cachekit import (
    DENOISER,
    GUIDANCE,
    Features,
    Guidance,
    Kind,
    Layout,
    NestedRegion,
    Site,
    SiteError,
    SiteMap,
    Sites,
    Span,
    SpecError,
    WholeDenoiser,
)

BLOCKS = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(4))
CHAINS = SiteMap("Toy", BLOCKS, chains=(BLOCKS[:1], BLOCKS), streams=(("x",), ("x", "text")))
BARE = SiteMap("Bare", (Site("ff", Kind.FEED_FORWARD),))


def names(place, sites=TOY):
    return [target.name for target in place.find(sites)]


def test_sites_of_a_kind_and_of_several():
    assert names(Sites(kinds="cross_attention")) == ["down.0.cross", "down.1.cross", "mid.cross"]
    assert set(names(Sites(kinds=("self_attention", "block")))) == {"mid.self", "down.0", "down.1", "mid"}


def test_the_denoiser_and_guidance():
    assert WholeDenoiser().find(BARE) == [DENOISER]
    assert Guidance().find(BARE) == [GUIDANCE]


@pytest.mark.parametrize(
    ("keep", "layout", "stays"),
    [
        ("cond", Layout(), "cond"),
        ("uncond", Layout(), "uncond"),
        ("auto", Layout(), "uncond"),
        ("auto", Layout(condition="image"), "cond"),
        ("auto", Layout().by_calls(("cond", "uncond")), "cond"),
    ],
)
def test_the_branch_that_stays(keep, layout, stays):
    assert Guidance(keep=keep).stays(layout) == stays


def test_regions_are_counted_from_the_shallowest():
    assert names(NestedRegion()) == ["region 0"]
    assert names(NestedRegion(branch=1)) == ["region 1"]


@pytest.mark.parametrize(
    ("span", "entry", "exit_", "streams"),
    [
        (Span(), "blocks.0", "blocks.3", ("x", "text")),
        (Span(first=1, stop=3), "blocks.1", "blocks.2", ("x", "text")),
        (Span(first=-2), "blocks.2", "blocks.3", ("x", "text")),
        (Span(stop=-1), "blocks.0", "blocks.2", ("x", "text")),
        (Span(chain=0), "blocks.0", "blocks.0", ("x",)),
    ],
)
def test_a_span_is_a_run_of_blocks_of_the_longest_chain(span, entry, exit_, streams):
    (region,) = span.find(CHAINS)
    assert (region.entry, region.exit, region.streams) == (entry, exit_, streams)


@pytest.mark.parametrize(
    ("place", "sites", "said"),
    [
        (
            Sites(kinds="cross_attention"),
            BARE,
            "looked for cross_attention, but Bare has feed_forward x 1; use another",
        ),
        (Sites(kinds=("self_attention", "block")), BARE, "looked for block, self_attention, but"),
        (NestedRegion(), BARE, "looked for paired down and up blocks, but Bare has feed_forward x 1; use a policy for"),
        (NestedRegion(), CHAINS, "use where=span"),
        (NestedRegion(branch=2), TOY, "branch=2, but ToyUNet has branches 0..1; use one of them"),
        (Features(), BARE, "looked for blocks in a row, but Bare has feed_forward x 1; use where=denoiser"),
        (Span(), BARE, "looked for a chain of blocks, but Bare has feed_forward x 1; use a policy for attention"),
        (Span(chain=2), CHAINS, "chain=2, but Toy has chains 0..1; use one of them"),
        (Span(first=4), CHAINS, "0 blocks up to block 3, but chain 1 of Toy has blocks 0..3; give a span within them"),
        (Span(stop=5), CHAINS, "5 blocks up to block 4, but chain 1 of Toy has blocks 0..3"),
        (Span(first=2, stop=2), CHAINS, "0 blocks up to block 1, but"),
        (Span(first=-5), CHAINS, "5 blocks up to block 3, but"),
    ],
)
def test_a_model_without_such_a_place_is_refused_in_a_line(place, sites, said):
    with pytest.raises(SiteError) as caught:
        place.find(sites)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_guidance_and_the_denoiser_are_no_kinds_of_sites():
    for kind in (Kind.GUIDANCE, Kind.DENOISER):
        with pytest.raises(SpecError, match=f"{kind} is no kind of site, but a place of its own; write where={kind}"):
            Sites(kinds=(kind,))
    assert set(Sites.spellings()) == {str(kind) for kind in Kind} - {"guidance", "denoiser"}


def test_an_unknown_kind_is_refused_with_the_kinds_that_serve():
    with pytest.raises(SpecError, match=r"unknown kind 'blok' \(did you mean 'block'\?\); known: (.*)$") as caught:
        Sites(kinds=(Kind.SELF_ATTENTION, "blok"))
    assert str(caught.value).partition("known: ")[2].split(", ") == [*Sites.spellings()]
