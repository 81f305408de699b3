"""Who bears a token, and that nobody bears one that is not set."""

from __future__ import annotations

import pytest

from app.bearer import bears


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "])
def test_the_scheme_may_be_written_as_one_likes(header: str) -> None:
    assert bears(header, "s3cret")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cre", "Bearer s3cret s3cret", "Bearer ÿ"])
def test_anything_else_is_no_token(header: str) -> None:
    assert not bears(header, "s3cret") and not bears(header, "")
