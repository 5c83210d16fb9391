"""Where the user's model runs: from checkpoint and prompt to a :class:`TokenTrace`."""
