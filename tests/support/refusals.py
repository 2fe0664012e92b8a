"""What a user sees of an error, for all rooms."""

import pytest

from sayo_verl.errors import SayoError


def refusal(code: str, says: str = ""):
    """Expect a ``SayoError`` of this code: one line with a place and a fix, in which the pattern ``says`` is found."""
    return pytest.raises(SayoError, match=rf"^(?=SAYO-{code}: .+ \| at .+ \| (.* \| )?fix: .+\Z).*{says}")
