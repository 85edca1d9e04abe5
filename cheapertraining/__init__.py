"""CheaperTraining: documents become token shards, a plan mixes them into batches, training changes the plan."""

__version__ = "0.1.0"
