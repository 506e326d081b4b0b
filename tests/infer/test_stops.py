"""Stop strings against the plain statement: read characters one by one, end where a stop string first stands complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivium.infer.stops import StopStrings


def plainly(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, done))], True
    return text, False


TEXT = st.text("ab€", max_size=12)


@given(st.lists(TEXT, max_size=8), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_pieces_change_nothing_and_only_the_start_of_a_stop_is_held(pieces: list[str], stops: list[str]) -> None:
    watch, out, fed = StopStrings(stops), "", ""
    expected, hit = plainly("".join(pieces), stops)
    for piece in pieces:
        out += watch.push(piece)
        assert expected.startswith(out)
        fed += piece
        held = fed[len(out) :]
        if not watch.hit:
            assert all(plainly(fed + stop, stops)[0].startswith(out) for stop in stops)
            assert not held or any(stop.startswith(held) for stop in stops)
    assert watch.hit == hit
    assert out + watch.finish() == expected


def test_text_that_cannot_be_a_stop_leaves_at_once() -> None:
    watch = StopStrings(["<end>"])
    assert [watch.push(piece) for piece in ("a<", "b<e", "nd", "x", "<end", ">more")] == ["a", "<b", "", "<endx", "", ""]
    assert watch.hit and watch.push("more") == "" and watch.finish() == ""
