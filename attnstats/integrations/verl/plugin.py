"""The entry point `verl.plugins`, which verl loads when it is imported: its trainers by the name `rhythm_sync`."""

import logging

try:
    from attnstats.integrations.verl import trainer  # noqa: F401
except Exception as error:
    # verl drops what a plug-in raises, and then knows no trainer of that name.
    logging.getLogger(__name__).warning("attnstats: trainer.v1.trainer_mode=rhythm_sync is not available: %r", error)
    raise
