//! What is no checkpoint, or lies about itself.

use super::*;

// What is refused.

#[test]
fn what_is_no_checkpoint_is_named() {
    let expected = "expected a PyTorch zip, a legacy PyTorch pickle, safetensors or an index of shards, found";
    refused(b"", &[expected, "an empty file"]);
    refused(b"import torch\n", &[expected, "bytes that begin with [69, 6d, 70, 6f, 72, 74, 20, 74]"]);
    refused(b"{}", &["weight_map: expected an object of file names by tensor, found missing field"]);
}

#[test]
fn a_checkpoint_without_tensors_says_what_is_there() {
    let code = dict(&[("epoch", int(3)), ("net", object("net.Net", dict(&[("w", vector("0", 3))])))]);
    let found = "expected a dict of tensors, or one under model, state_dict, model_state_dict, module, \
                 found a dict with epoch (an integer), net (an object of net.Net)";
    refused(&archive(&code, &[("0", three())]), &["entry net/data.pkl: ", found]);
    refused(&legacy(&code, &[]), &["found a dict with epoch"]);
    refused(&archive(&object("net.Net", none()), &[]), &["found an object of net.Net"]);
    refused(&archive(&vector("0", 3), &[("0", three())]), &["found a tensor"]);
    refused(&archive(&dict(&[]), &[]), &["found a dict without names"]);
    let keys: Vec<String> = (10..40).map(|key| format!("k{key}")).collect();
    let many: Vec<(&str, Code)> = keys.iter().map(|key| (key.as_str(), none())).collect();
    refused(&archive(&dict(&many), &[]), &["k10 (a scalar or another object), k11", "and 10 other keys"]);
}

#[test]
fn no_call_is_made() -> Outcome {
    // What every pickle that attacks does, beside and in place of a tensor.
    let attack = || call("os.system", &[text("touch /tmp/owned")]);
    let code = ordered(&[("w", vector("0", 3)), ("x", attack())]);
    let checkpoint = open(&archive(&code, &[("0", three())]))?;
    assert!(checkpoint.left_out().contains("x"));
    refused(&archive(&attack(), &[]), &["found an object of os.system"]);
    Ok(())
}

#[test]
fn views_beyond_their_storage_are_refused() {
    let with = |offset: i64, shape: &[i64], strides: &[i64]| {
        let code = dict(&[("w", view(storage("torch.FloatStorage", "0", 3), offset, shape, strides))]);
        [archive(&code, &[("0", three())]), legacy(&code, &[("0", 3, three())])]
    };
    let cases: [(i64, &[i64], &[i64], &str); 9] = [
        (0, &[4], &[1], "expected a view of the 3 numbers of its storage, found one that reaches number 4"),
        (1, &[3], &[1], "reaches number 4"),
        (0, &[2, 2], &[2, 1], "reaches number 4"),
        (0, &[2], &[i64::MAX], "reaches number"),
        (i64::MAX, &[1], &[1], "reaches number"),
        (0, &[i64::MAX, 4], &[0, 1], "expected an offset, a shape, and a stride for each dimension"),
        (-1, &[1], &[1], "expected an offset"),
        (0, &[1, 1], &[1], "a stride for each dimension"),
        // Three numbers that claim to be four terabytes.
        (0, &[1 << 20, 1 << 20], &[0, 0], "bytes, as many as there are, found shape [1048576, 1048576]"),
    ];
    for (offset, shape, strides, message) in cases {
        for bytes in with(offset, shape, strides) {
            refused(&bytes, &["tensor w: ", message]);
        }
    }
}

#[test]
fn storages_of_another_size_are_refused() {
    let twice = dict(&[("w", vector("0", 3)), ("v", vector("0", 2))]);
    refused(
        &archive(&twice, &[("0", three())]),
        &["tensor v: expected a storage of 8 bytes, found 12 bytes in storage 0"],
    );
    refused(&legacy(&twice, &[("0", 3, three())]), &["storage 0: expected 2 numbers, found 3"]);
    let short = &three()[..8];
    refused(&archive(&one_vector(), &[("0", short.to_vec())]), &["tensor w: expected a storage of 12 bytes"]);
    refused(&archive(&one_vector(), &[]), &["tensor w: expected an entry net/data/0, found none of this name"]);
    refused(&legacy(&one_vector(), &[]), &["tensor w: expected storage 0, found 0 others"]);
    let huge = dict(&[("w", view(storage("torch.FloatStorage", "0", i64::MAX), 0, &[1], &[1]))]);
    refused(&legacy(&huge, &[("0", i64::MAX, three())]), &["storage 0: expected 9223372036854775807 numbers"]);
    refused(&archive(&huge, &[("0", three())]), &["tensor w: expected a length that is a number"]);
    let negative = dict(&[("w", storage("torch.FloatStorage", "0", -1))]);
    refused(&archive(&negative, &[]), &["expected the length of a storage, found an integer at byte"]);
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    let code = dict(&[("w", vector("0", 3)), ("w", vector("0", 3))]);
    refused(&archive(&code, &[("0", three())]), &["tensor w: expected each name once, found it twice"]);
    let mut entries = entries(&one_vector(), &[("0", three())]);
    entries.push(stored("net/data/0", &three()));
    refused(&zip(&entries), &["archive: expected a name once, found two entries of the same name"]);
    refused(
        &legacy(&one_vector(), &[("0", 3, three()), ("0", 3, three())]),
        &["storage 0: expected each storage once"],
    );
    let entry = r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#;
    refused(&safetensors(&format!(r#"{{"w":{entry},"w":{entry}}}"#), &three()), &["header: ", "the name w twice"]);
}

#[test]
fn entries_that_would_lead_elsewhere_are_refused() {
    for name in ["../w", "net/../../w", "/etc/passwd", r"net\w", "C:/w", "C:w", "net/w\0"] {
        let mut entries = entries(&one_vector(), &[("0", three())]);
        entries.push(stored(name, b""));
        refused(&zip(&entries), &["archive: expected entries whose names are relative paths", &format!("{name:?}")]);
    }
    let mut fine = entries(&one_vector(), &[("0", three())]);
    fine.push(stored("net/..w/.data/serialization_id", b"1"));
    assert!(open(&zip(&fine)).is_ok());
}

#[test]
fn an_archive_that_is_no_checkpoint_is_named() {
    refused(&zip(&[stored("word/document.xml", b"")]), &["expected one entry NAME/data.pkl, found 0 among 1 entries"]);
    let mut two = entries(&one_vector(), &[("0", three())]);
    two.push(stored("other/data.pkl", b""));
    refused(&zip(&two), &["found 2 among 5 entries"]);
}

#[test]
fn big_endian_files_are_refused() {
    let mut entries = entries(&one_vector(), &[("0", three())]);
    entries[1] = stored("net/byteorder", b"big");
    refused(&zip(&entries), &["entry net/byteorder: expected little, found big"]);
    let mut old = legacy(&one_vector(), &[("0", 3, three())]);
    let at = old.iter().position(|byte| *byte == 0x88).unwrap();
    old[at] = 0x89;
    refused(&old, &["system information", "expected little_endian to be true"]);
}

#[test]
fn entries_that_lie_about_their_size_are_refused() {
    let with = |change: fn(&mut Entry)| {
        let mut entries = entries(&one_vector(), &[("0", three())]);
        change(&mut entries[2]);
        zip(&entries)
    };
    let wrong_size = "tensor w: expected entry net/data/0 of a size that its 12 bytes can have, found 4096 bytes";
    refused(&with(|entry| entry.len = 4096), &[wrong_size]);
    refused(&with(|entry| (entry.method, entry.len) = (8, u32::MAX)), &["found 4294967295 bytes"]);
    refused(&with(|entry| entry.method = 12), &["expected entry net/data/0 stored or deflated"]);
    refused(&with(|entry| entry.flags = 1), &["expected entry net/data/0 in clear"]);
    refused(&with(|entry| entry.crc ^= 1), &["tensor w: expected numbers of checksum"]);
    refused(&with(|entry| entry.method = 8), &["tensor w: "]);
    assert!(open(&with(|entry| entry.crc = 0)).is_ok());

    // Honest headers, but deflated bytes that end before the numbers do.
    let code = dict(&[("w", vector("0", 1000))]);
    let mut entries = entries(&code, &[]);
    entries.push(Entry { len: 4000, ..deflated("net/data/0", &[0; 2000]) });
    refused(&zip(&entries), &["tensor w: expected 4000 bytes of numbers, found the end after 2000"]);
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let header = r#"{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#;
    for whole in [
        archive(&one_vector(), &[("0", three())]),
        legacy(&one_vector(), &[("0", 3, three())]),
        safetensors(header, &three()),
    ] {
        assert!(only(&whole).is_ok());
        for len in 0..whole.len() {
            refused(&whole[..len], &["expected", "found"]);
        }
    }
    let whole = legacy(&one_vector(), &[("0", 3, three())]);
    refused(&whole[..whole.len() - 1], &["storage 0: expected 3 numbers of torch.FloatStorage, found 11 bytes"]);
    let whole = archive(&one_vector(), &[("0", three())]);
    refused(&whole[..whole.len() - 1], &["archive: expected a whole zip archive"]);
    refused(&safetensors(header, &three()[..11]), &["tensor w: expected data_offsets within the 11 bytes of data"]);
}

#[test]
fn damaged_pickles_say_where() {
    let with = |pickle: &[u8]| zip(&[stored("net/data.pkl", pickle)]);
    let cases: [(&[u8], &str); 18] = [
        (b"\x80\x02}P.", "expected an instruction of pickle protocol 2 to 5, found opcode 0x50 at byte 3"),
        (b"\x80\x02\xff", "found opcode 0xff at byte 2"),
        (b"\x80\x01}.", "expected a pickle of protocol 2 to 5, found protocol 1 at byte 2"),
        (b"\x80\x02}", "expected more of the pickle, found its end at byte 3"),
        (b"", "found its end at byte 0"),
        (b"\x80\x02.", "expected a value, found an empty stack at byte 3"),
        (b"\x80\x02(}0e", "expected a value, found an empty stack"),
        (b"\x80\x02t", "expected a mark, found none at byte 3"),
        (b"\x80\x02h\x07", "expected a memo slot that was filled, found slot 7 at byte 4"),
        (b"\x80\x02}r\xff\xff\xff\xff", "expected a memo slot below the number of bytes"),
        (b"\x80\x02X\x09\0\0\0abc", "expected 9 bytes, found the end after 3 of them"),
        (b"\x80\x02X\xff\xff\xff\xffabc", "expected a pickle of at most 67108864 bytes, found 4294967295 more bytes"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc", "found 18446744073709551615 more bytes"),
        (b"\x80\x02B\x09\0\0\0abc", "expected 9 bytes, found the end after 3 of them"),
        (b"\x80\x02X\x01\0\0\0\xff", "expected UTF-8, found invalid utf-8"),
        (b"\x80\x02}(NNNu", "expected keys and values, found a key without a value"),
        (b"\x80\x02NN\x93", "expected the name of a function or class"),
        (b"\x80\x02X\x07\0\0\0storage\x85Q", "expected type, key, place and length of a storage, found 1 values"),
    ];
    for (pickle, message) in cases {
        refused(&with(pickle), &["entry net/data.pkl: ", message]);
    }
    let long = "x".repeat(300);
    refused(&with(&pickle(&global(&format!("a.{long}")))), &["found a text of 301 bytes"]);
    let old_view = [text("storage"), global("torch.FloatStorage"), text("0"), text("cpu"), int(3), ints(&[0, 0, 3])];
    let code = [tuple(&old_view), b"Q".to_vec()].concat();
    refused(&with(&pickle(&code)), &["expected a storage, found a view of one, as PyTorch wrote before 0.4"]);
}

#[test]
fn legacy_files_must_begin_as_they_should() {
    let whole = legacy(&one_vector(), &[("0", 3, three())]);
    let mut magic = whole.clone();
    magic[5] ^= 1;
    refused(&magic, &["magic number: expected 0x1950a86a20f9469cfc6c of PyTorch, found [80, 02, 8a, 0a"]);
    let version = [MAGIC, &pickle(&int(1000))].concat();
    refused(&version, &["protocol version from byte 15 on: expected 1001, found 1000"]);
    let version = [MAGIC, &pickle(&text("1001"))].concat();
    refused(&version, &["protocol version", "expected 1001, found a text"]);
    let mut opcode = whole.clone();
    opcode[15 + 2] = 0xee;
    refused(&opcode, &["protocol version from byte 15 on: ", "found opcode 0xee at byte 2"]);
    let beyond = legacy(&one_vector(), &[("0", 3, three()), ("1", 3, three())]);
    refused(&beyond, &["storage 1: expected a tensor that looks at it, found none in the pickle"]);
}

#[test]
fn nesting_and_circles_do_no_harm() -> Outcome {
    const DEEP: usize = 1_000_000;
    let deep = |open: &[u8], close: &[u8]| [open.repeat(DEEP), b"N".to_vec(), close.repeat(DEEP)].concat();
    for nested in [deep(b"]", b"a"), deep(b"", b"\x85"), deep(b"}N", b"s"), deep(b"(", b"t")] {
        let code = dict(&[("history", nested), ("w", vector("0", 3))]);
        assert_eq!(names(&archive(&code, &[("0", three())]))?, ["w"]);
    }
    // A list and a dict that hold themselves.
    let code = dict(&[("list", b"]q\x01h\x01a".to_vec()), ("model", b"}q\x02X\x05\0\0\0modelh\x02s".to_vec())]);
    refused(&archive(&code, &[]), &["found a dict with list (a list), model (a dict)"]);
    Ok(())
}

#[test]
fn headers_of_safetensors_that_lie_are_refused() {
    let with = |entry: &str| safetensors(&format!(r#"{{"w":{entry}}}"#), &three());
    for (entry, message) in [
        (r#"{"dtype":"F32","shape":[4],"data_offsets":[0,12]}"#, "expected the bytes of shape [4] of F32, found 12"),
        (r#"{"dtype":"F32","shape":[3],"data_offsets":[12,0]}"#, "expected data_offsets within the 12 bytes of data"),
        (r#"{"dtype":"F32","shape":[3],"data_offsets":[4,16]}"#, "found 4 to 16"),
        (r#"{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,12]}"#, "expected a shape"),
        (r#"{"dtype":"F32","shape":[-3],"data_offsets":[0,12]}"#, "expected dtype, shape and data_offsets"),
        (r#"{"dtype":"F32","shape":[3]}"#, "missing field `data_offsets`"),
    ] {
        refused(&with(entry), &["tensor w: ", message]);
    }
    let part = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    refused(&with(part), &["header: expected tensors that cover the 12 bytes of data", "found 8 bytes of tensors"]);
    let hole = r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#;
    refused(&with(hole), &["without hole or overlap"]);
    refused(&[&[0xff, 0xff, 0, 0, 0, 0, 0, 0][..], b"{}"].concat(), &["header: expected at most 2 bytes, found 65535"]);
    refused(&safetensors("{}      ", b""), &["header: expected tensors, found none"]);
    refused(&safetensors("{]", b""), &["header: expected names and tensors"]);
}
