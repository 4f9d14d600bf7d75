# docker build -t collapse-probe .
# docker run --rm -v "$PWD":/work collapse-probe analyze -m ours:digits-mhsa --data bundled:digits -o out
# With a GPU: docker run --gpus all … ; on a cluster without docker: apptainer build collapse-probe.sif docker-daemon://collapse-probe:latest
FROM python:3.11-slim
WORKDIR /opt/collapse-probe
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY cli cli
COPY collapse_probe collapse_probe
# The releases of requirements.lock, of what a plain install and the extra `demo` need.
RUN pip install --no-cache-dir --constraint requirements.lock ".[demo]"
WORKDIR /work
ENTRYPOINT ["collapse-probe"]
CMD ["--help"]
