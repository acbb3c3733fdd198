"""What a scan leaves on disk: every neuron's top samples and counts, opened lazily."""

from neuronlens.atlas.atlas import Atlas, NeuronStatistics
from neuronlens.atlas.folder import (
    check_files,
    described,
    durable,
    flush_names,
    locked,
    new_folder,
    put_in_place,
    require_free,
    require_space,
    save_tensors,
)
from neuronlens.atlas.manifest import (
    FORMAT,
    Choices,
    FileInfo,
    Manifest,
    ModelInfo,
    Part,
    SampleRecord,
    Session,
    Shard,
    Skipped,
)
from neuronlens.atlas.write import read_records, site_file, write, write_sessions, write_sites

__all__ = [
    "FORMAT",
    "Atlas",
    "Choices",
    "FileInfo",
    "Manifest",
    "ModelInfo",
    "NeuronStatistics",
    "Part",
    "SampleRecord",
    "Session",
    "Shard",
    "Skipped",
    "check_files",
    "described",
    "durable",
    "flush_names",
    "locked",
    "new_folder",
    "put_in_place",
    "read_records",
    "require_free",
    "require_space",
    "save_tensors",
    "site_file",
    "write",
    "write_sessions",
    "write_sites",
]
