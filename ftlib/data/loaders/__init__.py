"""Loaders: a dataset as it is released → rows, one module for each source.

Each module has `examples(data) -> Iterator[Example | Bad]`, which streams: a faulty record comes as `Bad` with its
place and the rows after it follow; only what leaves nothing to go on with (a missing file, broken JSON) is a UserError.
Images are named, never opened. Loaders of releases that must leave something out also have `left_out(data)`, which
counts it by reason; one without annotation files may have `version(data)`, which tells when the rows are others.
"""
