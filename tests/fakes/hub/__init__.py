"""A Hugging Face Hub on a local port: real HTTP, real git and LFS digests, faults on demand.

Speaks what huggingface_hub asks of a Hub to read a model, and redirects as the real one does: large files to where
their bytes are, moved and otherwise spelled repositories to their name. By hand:
`python -m tests.fakes.hub --port 8100 --repo org/name=FOLDER`.
"""

from tests.fakes.hub.faults import Fault
from tests.fakes.hub.messages import Answer, Request, Seen
from tests.fakes.hub.repos import Repo
from tests.fakes.hub.server import FakeHub, fake_hub

__all__ = ["Answer", "FakeHub", "Fault", "Repo", "Request", "Seen", "fake_hub"]
