"""A server that speaks as much of W&B's protocol as its client (0.31) needs to log runs and artifacts.

GraphQL for runs and artifacts, `file_stream` for history, PUT for files. It keeps all that it is told.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

API_KEY = "k" * 40
ENTITY = "ada"
Mood = Literal["well", "hangs", "refuses"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed leave their connections as they are."""


class WandbServer:
    """`mood`: `hangs` takes requests and never answers, `refuses` says 401 to everybody."""

    def __init__(self, mood: Mood = "well") -> None:
        self.mood = mood
        self.requests: Counter[str] = Counter()  # operation, or method and first part of the path
        self.runs: dict[str, dict[str, Any]] = {}  # name -> what `UpsertBucket` said
        self.history: dict[str, dict[int, dict[str, Any]]] = {}  # run -> line -> row
        self.summary: dict[str, dict[str, Any]] = {}
        self.complete: set[str] = set()
        self.files: dict[str, bytes] = {}  # path of the upload -> content
        self.artifacts: dict[str, dict[str, Any]] = {}  # id -> type, name, digest, aliases, metadata, state
        self.manifests: dict[str, dict[str, Any]] = {}
        self.outputs: list[tuple[str, str]] = []  # (run, artifact id)
        self.inputs: list[tuple[str, str]] = []
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def artifact(self, artifact_id: str) -> tuple[str, str]:
        """Its type and name."""
        found = self.artifacts[artifact_id]
        return found["type"], found["name"]

    def content(self, artifact_id: str, name: str) -> bytes:
        """Of a file in it, by way of its manifest."""
        assert name in json.loads(self.files[f"/upload/manifest/{artifact_id}"])["contents"]
        return self.files[f"/upload/artifact/{artifact_id}/{name}"]

    # --- HTTP ---------------------------------------------------------------------------------------------

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, answer = server._take(self.command, self.path, self.headers.get("Authorization", ""), body)
                payload = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PUT = _answer  # noqa: N815

        return Handler

    def _take(self, method: str, path: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.mood == "hangs":
            self.requests["hung"] += 1
            self._stopping.wait()
        with self._lock:
            if path == "/graphql":
                key = base64.b64decode(authorization.removeprefix("Basic ")).decode().removeprefix("api:")
                if self.mood == "refuses" or key != API_KEY:
                    self.requests["401"] += 1
                    return 401, {"error": "invalid API key"}
                asked = json.loads(body)
                found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                operation = found[1] if found else "?"
                self.requests[operation] += 1
                return 200, self._graphql(operation, asked["query"], asked.get("variables") or {})
            if path.endswith("/file_stream"):
                self.requests["file_stream"] += 1
                self._stream(path.split("/")[-2], json.loads(body))
                return 200, {}
            self.requests[f"{method} {path.split('/')[1]}"] += 1
            self.files[path] = body
            return 200, {}

    def _stream(self, run: str, told: Mapping[str, Any]) -> None:
        files = told.get("files", {})
        for number, line in enumerate(files.get("wandb-history.jsonl", {}).get("content", [])):
            offset = files["wandb-history.jsonl"]["offset"]
            self.history.setdefault(run, {})[offset + number] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary[run] = json.loads(line)
        if told.get("complete"):
            self.complete.add(run)

    # --- GraphQL ------------------------------------------------------------------------------------------

    def _graphql(self, operation: str, query: str, values: Mapping[str, Any]) -> dict[str, Any]:
        answer = getattr(self, f"_on_{operation}", None)
        if answer is None:
            self.unknown.append(f"{operation} {json.dumps(values)[:500]} {query}")
            return {"data": {}}
        return {"data": answer(values)}

    def _on_UpsertBucket(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.setdefault(values["name"], {})
        run.update({key: value for key, value in values.items() if value is not None})
        project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": values["name"], "name": values["name"], "displayName": run.get("displayName"), "config": "{}"}
        return {"upsertBucket": {"bucket": {**bucket, "project": project, "historyLineCount": 0}, "inserted": True}}

    def _on_Viewer(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "teams": {"edges": []}, "flags": "{}"}}

    def _on_CreateRunFiles(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/run/{values['run']}/{name}"} for name in values["files"]
        ]
        return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}

    def _on_ArtifactType(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = values["name"].partition(":")[0]
        types = [artifact["type"] for artifact in self.artifacts.values() if artifact["name"] == name]
        return {"project": {"artifact": {"artifactType": {"name": types[0]}} if types else None}}

    def _on_ServerFeaturesQuery(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _on_CreateArtifact(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        """The same content under the same name is the artifact that is there already."""
        told = values["input"]
        key = {"type": told["artifactTypeName"], "name": told["artifactCollectionName"], "digest": told["digest"]}
        known = [number for number, found in self.artifacts.items() if key.items() <= found.items()]
        artifact_id = known[0] if known else f"artifact-{len(self.artifacts)}"
        if not known:
            self.artifacts[artifact_id] = {
                **key,
                "aliases": [alias["alias"] for alias in told["aliases"]],
                "metadata": json.loads(told["metadata"] or "{}"),
                "state": "PENDING",
            }
        if told["runName"] and not told.get("useAfterCommit"):
            self.outputs.append((told["runName"], artifact_id))
        state = self.artifacts[artifact_id]["state"]
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": artifact_id, "state": state, "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        artifact_id = values["input"]["artifactID"] if "input" in values else values["artifactID"]
        upload = {"id": "f", "uploadUrl": f"{self.url}/upload/manifest/{artifact_id}", "uploadHeaders": []}
        manifest = {"id": f"manifest-{artifact_id}", "file": {**upload, "name": "m", "displayName": "m"}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_CreateArtifactFiles(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = []
        for file in values["input"]["artifactFiles"]:
            artifact_id, name = file["artifactID"], file["name"]
            upload = {"uploadUrl": f"{self.url}/upload/artifact/{artifact_id}/{name}", "uploadHeaders": []}
            extra = {"storagePath": f"{artifact_id}/{name}", "uploadMultipartUrls": None}
            nodes.append({"node": {**upload, **extra, "artifact": {"id": artifact_id}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _on_CommitArtifact(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        artifact_id = values["input"]["artifactID"] if "input" in values else values["artifactID"]
        self.artifacts[artifact_id]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact_id, "digest": self.artifacts[artifact_id]["digest"]}}}

    def _on_UseArtifact(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        told = values.get("input", values)
        self.inputs.append((told["runName"], told["artifactID"]))
        return {"useArtifact": {"artifact": {"id": told["artifactID"], "digest": "", "description": "", "state": ""}}}

    def _on_ArtifactByID(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: N802
        found = self.artifacts[values["id"]]
        project = {"id": "p", "internalId": "i", "name": "huggingtweets", "entity": {"name": ENTITY}}
        sequence = {"__typename": "ArtifactSequence", "name": found["name"], "project": project}
        same_name = [number for number, other in self.artifacts.items() if other["name"] == found["name"]]
        return {
            "artifact": {
                "__typename": "Artifact",
                "id": values["id"],
                "artifactSequence": sequence,
                "versionIndex": same_name.index(values["id"]),
                "artifactType": {"name": found["type"]},
                "description": None,
                "metadata": json.dumps(found["metadata"]),
                "ttlDurationSeconds": -2,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": None,
                "state": found["state"],
                "size": 0,
                "digest": found["digest"],
                "commitHash": None,
                "fileCount": 1,
                "createdAt": "2023-11-14T22:13:20",
                "updatedAt": None,
                "aliases": [],
            }
        }
