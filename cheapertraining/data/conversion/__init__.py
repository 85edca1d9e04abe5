"""Documents to shards: parallel, resumable, and the same bytes whatever the number of processes.

Phase 1 turns pieces of input into *windows*, packed rows of some million tokens, each committed by one rename. Phase 2
cuts the rows of all windows, in order, into shards of equal size. What a process finishes stays finished through a
crash, and ``index.json``, without which a folder is no shard folder, comes last.
"""

from cheapertraining.data.conversion.assemble import merge_parts
from cheapertraining.data.conversion.chat_encoder import ChatEncoder
from cheapertraining.data.conversion.encoders import TextEncoder
from cheapertraining.data.conversion.job import Job, Settings
from cheapertraining.data.conversion.report import Report, Trial, try_out
from cheapertraining.data.conversion.runner import convert

__all__ = ["ChatEncoder", "Job", "Report", "Settings", "TextEncoder", "Trial", "convert", "merge_parts", "try_out"]
