"""Token credit in verl: a plug-in that verl loads by itself, and functions on its batches for trainers of one's own.

With `trainer.v1.trainer_mode=rhythm_sync` the curves of the credit are read in the actor's pass for old
log-probabilities, and advantages are scaled after any estimator (docs/verl.md). The functions need no verl.
"""

from attnstats.integrations.verl.batch import query_mask, response_part, shape_advantages

__all__ = ["query_mask", "response_part", "shape_advantages"]
