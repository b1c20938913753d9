"""Why an answer ended, in the four words that the chat has for it, whichever of the many an upstream uses."""

import re

_WORDS = (
    ("length", re.compile(r"length|max_?(output_?)?tokens|token_?limit|model_length|max_length|incomplete")),
    (
        "content_filter",
        re.compile(
            r"content_?(filter|policy)|safety|moderat|sensitive|block|prohibited|recitation|spii|guardrail|refusal|risk"
        ),
    ),
    ("error", re.compile(r"error|abort|cancel|fail|insufficient|malformed|timeout|time_?limit|unavailable|interrupt")),
)


def plain_finish_reason(word: str) -> str:
    """`length`, `content_filter` or `error` where the upstream's word says so, else `stop`."""
    if word == "stop":
        return word
    lower = word.lower()
    return next((reason for reason, pattern in _WORDS if pattern.search(lower)), "stop")
