import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.spans import (
    END_TAG,
    SPAN_NAMES,
    TAGS,
    Malformed,
    Reason,
    Spans,
    from_xml,
    parse,
    render,
)

U, V, R, S, E, F, P, Q = TAGS
GOOD = f"{U}lost a pet{V}{R}grief{S}{E}sad{F}{P}I am sorry.{Q}"
SPANS = Spans("lost a pet", "grief", "sad", "I am sorry.")


def test_tags_are_the_eight_special_tokens_in_order():
    assert TAGS[0] == "<|understanding_begin|>"
    assert TAGS[5] == "<|emotion_end|>"
    assert TAGS[-1] == END_TAG == "<|response_end|>"
    assert len(TAGS) == 2 * len(SPAN_NAMES) == 8


def test_a_good_text_reads_as_spans_and_is_written_back():
    assert parse(GOOD) == SPANS
    assert render(SPANS) == GOOD


def test_white_space_around_spans_and_bodies_is_forgiven():
    loose = f"\n {U} lost a pet\n{V}\n\n{R}\tgrief {S} {E} sad {F}\r\n{P}I am sorry. {Q}  "
    assert parse(loose) == SPANS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.MISSING),
        ("I am sorry to hear that.", Reason.MISSING),
        (GOOD.replace(f"{R}grief{S}", ""), Reason.MISSING),
        (GOOD.replace(E, ""), Reason.MISSING),
        (GOOD.removeprefix(U), Reason.MISSING),
        (GOOD + GOOD, Reason.REPEATED),
        (GOOD + Q, Reason.REPEATED),
        (GOOD + f"{E}sad{F}", Reason.REPEATED),
        (f"{U}{GOOD}", Reason.REPEATED),
        (f"{R}grief{S}{U}lost{V}{E}sad{F}{P}sorry{Q}", Reason.OUT_OF_ORDER),
        (f"{U}lost{V}{R}grief{S}{P}sorry{Q}{E}sad{F}", Reason.OUT_OF_ORDER),
        (f"{U}lost{R}grief{S}{V}{E}sad{F}{P}sorry{Q}", Reason.NESTED),
        (f"{U}lost{R}grief{V}{S}{E}sad{F}{P}sorry{Q}", Reason.NESTED),
        (f"{U}lost{F}{V}{R}grief{S}{E}sad{F}{P}sorry{Q}", Reason.NESTED),
        (GOOD.replace("lost a pet", ""), Reason.EMPTY),
        (GOOD.replace("I am sorry.", " \n\t"), Reason.EMPTY),
        (GOOD.replace(">sad<", "> <"), Reason.EMPTY),
        ("Sure! " + GOOD, Reason.TEXT_OUTSIDE),
        (GOOD + "<|im_end|>", Reason.TEXT_OUTSIDE),
        (GOOD.replace(S, f"{S} so "), Reason.TEXT_OUTSIDE),
        (GOOD.replace("sad", "Sad"), Reason.UNKNOWN_LABEL),
        (GOOD.replace("sad", "sad and lonely"), Reason.UNKNOWN_LABEL),
        (GOOD.removesuffix(Q), Reason.UNCLOSED),
        (GOOD.replace(V, ""), Reason.UNCLOSED),
        (f"{U}lost a p", Reason.UNCLOSED),
    ],
)
def test_every_way_to_be_wrong_has_its_reason(text: str, reason: Reason):
    parsed = parse(text)
    assert isinstance(parsed, Malformed)
    assert parsed.reason is reason


def test_every_reason_is_reachable():
    cases = test_every_way_to_be_wrong_has_its_reason.pytestmark[0].args[1]
    assert {reason for _, reason in cases} == set(Reason)


def test_the_detail_names_the_fault():
    assert parse(GOOD.replace("sad", "greatful")) == Malformed(
        Reason.UNKNOWN_LABEL, "'greatful' is not one of the 32 labels; the closest label is 'grateful'"
    )
    assert parse(GOOD.replace(f"{P}I am sorry.{Q}", "")) == Malformed(Reason.MISSING, "the response span is missing")


@pytest.mark.parametrize(
    "spans",
    [
        Spans("", "grief", "sad", "sorry"),
        Spans("lost", " grief", "sad", "sorry"),
        Spans("lost", "grief", "happy", "sorry"),
        Spans("lost", "grief", "sad", f"sorry{Q}"),
        Spans(f"lost{V}{U}", "grief", "sad", "sorry"),
    ],
)
def test_spans_that_would_not_parse_back_are_not_written(spans: Spans):
    with pytest.raises(ValueError, match="spans: wanted"):
        render(spans)


def test_the_dataset_cards_tags_become_the_models():
    card = (
        "<understanding>lost a pet</understanding>\n<reasoning>grief</reasoning>\n"
        "<emotion>sad</emotion>\n<response>I am sorry.</response>"
    )
    assert isinstance(parse(card), Malformed)
    assert parse(from_xml(card)) == SPANS


def test_words_in_angle_brackets_stay_where_the_models_tags_are_used():
    text = GOOD.replace("grief", "they wrote <emotion> twice")
    assert from_xml(text) == text


plain = st.text(max_size=40).map(str.strip).filter(lambda text: text and not any(tag in text for tag in TAGS))
junk = st.lists(st.sampled_from([*TAGS, "sad", " ", "x", "<|", "|>", "\n"]) | st.text(max_size=5), max_size=14)


@settings(deadline=None, max_examples=50)
@given(plain, plain, st.sampled_from(EMOTIONS), plain)
def test_parse_after_render_is_identity(understanding: str, reasoning: str, emotion: str, response: str):
    spans = Spans(understanding, reasoning, emotion, response)
    assert parse(render(spans)) == spans


@settings(deadline=None, max_examples=50)
@given(junk)
def test_junk_never_raises_and_what_parses_renders_to_the_same_spans(parts: list[str]):
    parsed = parse("".join(parts))
    assert isinstance(parsed, Malformed) or parse(render(parsed)) == parsed


@settings(deadline=None, max_examples=50)
@given(st.permutations(TAGS))
def test_only_one_order_of_the_tags_is_good(tags: list[str]):
    parsed = parse("".join(f"{tag}sad" if tag in TAGS[::2] else tag for tag in tags))
    assert isinstance(parsed, Spans) == (tuple(tags) == TAGS)
