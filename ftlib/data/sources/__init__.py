"""Loaders: a dataset as it is released → rows, one module for each source.

Each module has `examples(data) -> Iterator[Example | InvalidRecord]`, which streams: a faulty record comes as
`InvalidRecord` with its place and the rows after it follow; only what leaves nothing to go on with (a missing file,
broken JSON) is a UserError. Images are named, never opened. Loaders of releases that must leave something out also have
`skipped_counts(data)`, which counts it by reason; one without annotation files may have `content_version(data)`, which
tells when the rows are others.
"""
