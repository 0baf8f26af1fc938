import pytest
from clouds import Cloud, copy_repository


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cloud(tmp_path, repository):
    made = Cloud(tmp_path / "cloud", repository)
    yield made
    made.end()
