def _todo(*a, **k):
    raise NotImplementedError
scan = selective_scan = short_conv = token_shift = cumulative_logsumexp = _todo
