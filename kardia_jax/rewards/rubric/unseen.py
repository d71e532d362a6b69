"""Characters that nobody sees and a tokenizer does: a place to hide words for the judge, or to hide words from a check.

>>> UNSEEN.sub("", "give\\u00ad me\\U000e0041 5")
'give me 5'
>>> HIDING.sub("?", "\\u2764\\ufe0f a\\u200d\\u202eb")          # emoji and joiners stay, a direction does not
'\\u2764\\ufe0f a\\u200d?b'

Source: Unicode 16, DerivedCoreProperties.txt, Default_Ignorable_Code_Point; controls, interlinear marks and halves of
surrogate pairs are added.
"""

import re

_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_CONTROLS = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufff9-\ufffb\ud800-\udfff"
_NEEDED = "\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f"
"""Joiners and variation selectors: without them emoji, and several scripts, are other words."""

UNSEEN = re.compile(f"[{_IGNORABLE}]")
"""Each of them; for a check that must not be led astray, on text that is then thrown away."""
HIDING = re.compile(f"[{_IGNORABLE}{_CONTROLS}](?<![{_NEEDED}])")
"""Those that text can do without, and controls. The look back comes second: most places have no such character."""
