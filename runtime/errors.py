"""Every error trivium raises on purpose: one root, client and server errors below it, each with its gRPC status."""

from __future__ import annotations

from typing import ClassVar


class TriviumError(Exception):
    """Root of all errors; its text is one clear line for a user."""

    status: ClassVar[str] = "INTERNAL"
    """Name of the grpc.StatusCode that answers a request which met this error."""
    exit_code: ClassVar[int] = 1


class ClientError(TriviumError):
    """The caller can mend it."""

    status = "INVALID_ARGUMENT"
    exit_code = 2


class InvalidRequest(ClientError):
    """A request whose shape, type, batch, parameter or output name does not fit the model."""


class InvalidPicture(ClientError):
    """Bytes that are not a picture we can read, or one over the limits."""


class UnknownModel(ClientError):
    """A model name or version that is not served."""

    status = "NOT_FOUND"


class Unauthenticated(ClientError):
    """A call without a token that the server knows."""

    status = "UNAUTHENTICATED"


class PermissionDenied(ClientError):
    """A call that its caller may not make."""

    status = "PERMISSION_DENIED"


class ConfigError(ClientError):
    """A setting, flag, recipe or file given by the user that cannot be used."""


class MissingExtra(ClientError):
    """A stage whose packages are not installed; the text holds the pip line to run."""


class ServerError(TriviumError):
    """The caller can only try again, or tell the operator."""


class QueueFull(ServerError):
    """No room for another request."""

    status = "RESOURCE_EXHAUSTED"


class Unavailable(ServerError):
    """No server answers, or none that takes requests."""

    status = "UNAVAILABLE"


class ShuttingDown(Unavailable):
    """The server drains and takes no new request."""


class DeadlineExceeded(ServerError):
    """The request's deadline passed before it was executed."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(ServerError):
    """The call was given up before it was answered."""

    status = "CANCELLED"


class Unimplemented(ServerError):
    """A call that the server does not have."""

    status = "UNIMPLEMENTED"


class EngineError(ServerError):
    """The compiled model failed to load or to run."""


class EngineMismatch(EngineError):
    """A compiled engine that this machine cannot run; another way of running the model is left.

    Args:
        reason: one word for a metric's label, say "other-card".
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class BundleError(ClientError):
    """A bundle that is refused; each reason has a subclass of its own."""

    status = "FAILED_PRECONDITION"


class ManifestError(BundleError):
    """manifest.json is absent, no JSON, or does not follow its schema."""


class UnknownSchema(BundleError):
    """The manifest's schema version is none that this release reads."""


class MissingFile(BundleError):
    """A file that the manifest lists is not there."""


class ExtraFile(BundleError):
    """A file that the manifest does not list is there."""


class DigestMismatch(BundleError):
    """A file's size or SHA-256 is not the one in the manifest."""


class OtherBundle(BundleError):
    """A server answers from another bundle than the one that was asked for."""


class UnsafePath(BundleError):
    """A path that is absolute, leaves the bundle's directory, or is no regular file."""
