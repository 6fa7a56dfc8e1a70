"""Files of a storage, wherever it is."""

from pathlib import Path

import pyarrow.fs as pafs

from serve.config import S3Section


def open_filesystem(uri: str, s3: S3Section) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder or URI, and the path there.

    Raises:
        ValueError, OSError: there is no such file system.
    """
    if uri.startswith("s3://"):
        # A server that is busy for a while is not one that is away.
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=s3.attempts)
        filesystem = pafs.S3FileSystem(
            endpoint_override=s3.endpoint, region=s3.region, retry_strategy=retries
        )
        return filesystem, uri.removeprefix("s3://")
    if "://" in uri:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    return pafs.LocalFileSystem(), str(Path(uri).resolve())
