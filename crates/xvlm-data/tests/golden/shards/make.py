"""Writes the shards beside it: pip install pyarrow zstandard; python make.py FOLDER"""
import io, json, tarfile, gzip, sys
import pyarrow as pa, pyarrow.parquet as pq, zstandard
out = sys.argv[1]
IMG = bytes.fromhex("ffd8ffe0") + b"image"
def tar(fmt):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as t:
        def add(name, data):
            i = tarfile.TarInfo(name); i.size = len(data); t.addfile(i, io.BytesIO(data))
        d = tarfile.TarInfo("folder"); d.type = tarfile.DIRTYPE; t.addfile(d)
        long = "folder/" + "very-long-" * 20 + "name"
        for key, n in (("folder/000000000", 0), (long, 1), ("folder/\u00e4\u00f6\u00fc", 2)):
            add(key + ".jpg", IMG); add(key + ".txt", f"text {n}".encode()); add(key + ".json", json.dumps({"caption": f"text {n}", "status": "success", "width": 5}).encode())
        s = tarfile.TarInfo("folder/link.jpg"); s.type = tarfile.SYMTYPE; s.linkname = "/etc/passwd"; t.addfile(s)
    return file.getvalue()
open(out + "/gnu.tar", "wb").write(tar(tarfile.GNU_FORMAT))
open(out + "/pax.tar.gz", "wb").write(gzip.compress(tar(tarfile.PAX_FORMAT), mtime=0))
lines = b"".join(json.dumps({"binary": "aW1hZ2U=", "caption": f"text {i}"}).encode() + b"\n" for i in range(500))
open(out + "/lines.jsonl.zst", "wb").write(zstandard.ZstdCompressor(level=19, write_checksum=True).compress(lines))
hub = pa.table({
    "image": pa.array([{"bytes": IMG, "path": "0.jpg"}, {"bytes": IMG, "path": None}, None], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "text": pa.array([["text 0", "more"], ["text 1"], ["text 2"]], pa.list_(pa.string())),
    "other": pa.array([1.5, None, 3.5]),
})
pq.write_table(hub, out + "/hub.parquet", compression="snappy", data_page_version="2.0", write_statistics=False)
img = pa.table({
    "sample_id": pa.array(range(4)), "url": ["http://x"] * 4, "caption": [f"text {i}" for i in range(4)], "key": [f"{i:09}" for i in range(4)],
    "status": ["success", "failed_to_download", "success", "success"], "error_message": [None] * 4, "width": [5] * 4, "exif": ["{}"] * 4,
    "jpg": pa.array([IMG, None, IMG, IMG], pa.binary()),
})
pq.write_table(img, out + "/img2dataset.parquet", compression="gzip", row_group_size=2, write_statistics=False)
pq.write_table(img.select(["caption", "jpg"]), out + "/zstd.parquet", compression="zstd", write_statistics=False)
