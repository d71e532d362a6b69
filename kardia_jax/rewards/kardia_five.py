"""The default rubric, read once from its file, ``rewards/rubrics/kardia_five.yaml``.

>>> KARDIA_FIVE.names
('relevance', 'empathy', 'persona_consistency', 'safety', 'fluency')
"""

from kardia_jax.rewards.rubric import load_rubric

KARDIA_FIVE = load_rubric("kardia_five")
