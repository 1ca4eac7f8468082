"""A user's own model, as the registry hands it to the engine. Free of torch."""

from api.config import ModelSource
from api.errors import ModelUnavailable, NotFound


class OwnModel(ModelSource):
    """A version of a model that belongs to one user, who alone draws with it."""

    owner: str
    name: str
    number: int
    version_id: str
    sha256: str
    """Of its weights: a file that was changed since does not load."""

    @property
    def model_id(self) -> str:
        """The name the API answers with."""
        return f"{self.owner}/{self.name}@{self.number}"

    def require_owner(self, user_id: str | None) -> None:
        """Raises NotFound unless it is this user's."""
        if user_id != self.owner:
            raise NotFound(f"there is no model {self.name} of theirs")

    def require_unchanged(self, sha256: str) -> None:
        """Raises ModelUnavailable unless this is the hash of its weights."""
        if sha256 != self.sha256:
            raise ModelUnavailable(f"the file of {self.model_id} was changed", "Train or upload it again.")
