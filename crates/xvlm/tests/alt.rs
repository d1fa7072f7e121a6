//! Alternative texts: which images of a document get one, where it is written, and that nothing else changes.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use xvlm::alt::{
    Alt, Choice, Describer, Document, Edited, Format, Outcome, Page, Phrasing, Report, fill_in, is_picture,
};
use xvlm::{Picture, Written};

/// A document with a description of each image that has none: `D1`, `D2`, …
fn filled(format: Format, text: &str, choice: Choice) -> String {
    let document = Document::read(format, text.as_bytes().to_vec()).unwrap();
    let chosen = document.chosen(choice);
    let texts: Vec<(usize, String)> = chosen.iter().zip(1..).map(|(&image, i)| (image, format!("D{i}"))).collect();
    let edited = document.with(&texts);
    assert_eq!(edited.undone(), text.as_bytes());
    String::from_utf8(edited.content).unwrap()
}

fn html(text: &str) -> String {
    filled(Format::Html, text, Choice::default())
}

fn markdown(text: &str) -> String {
    filled(Format::Markdown, text, Choice::default())
}

fn sources(format: Format, text: &str) -> Vec<(usize, String, Alt)> {
    let document = Document::read(format, text.as_bytes().to_vec()).unwrap();
    let of = |image: &xvlm::alt::Image| (image.line, image.source.clone().unwrap_or_default(), image.alt);
    document.images().iter().map(of).collect()
}

#[test]
fn images_of_html_without_a_description_get_one() {
    for (before, after) in [
        ("<p><img src=a.png></p>", "<p><img alt=\"D1\" src=a.png></p>"),
        ("<IMG\n\tSRC='a.png'/>", "<IMG alt=\"D1\"\n\tSRC='a.png'/>"),
        ("<img/src=a.png/>", "<img alt=\"D1\"/src=a.png/>"),
        ("<img>", "<img alt=\"D1\">"),
        (
            "a\r\n\r\n<img src=a.png>\r\n<img src=b.png>",
            "a\r\n\r\n<img alt=\"D1\" src=a.png>\r\n<img alt=\"D2\" src=b.png>",
        ),
        (
            "ü € 𝄞 <img src=ü.png> &amp; <img src=\"a&amp;b.png\">",
            "ü € 𝄞 <img alt=\"D1\" src=ü.png> &amp; <img alt=\"D2\" src=\"a&amp;b.png\">",
        ),
        ("<img title='a > b' src=a.png>", "<img alt=\"D1\" title='a > b' src=a.png>"),
        ("<img data-alt=x src=a.png>", "<img alt=\"D1\" data-alt=x src=a.png>"),
        ("<noscript><img src=a.png></noscript>", "<noscript><img alt=\"D1\" src=a.png></noscript>"),
        (
            "<picture><source srcset=b.webp><img src=a.png></picture>",
            "<picture><source srcset=b.webp><img alt=\"D1\" src=a.png></picture>",
        ),
        ("<pre>x</pre><img src=a.png></code>", "<pre>x</pre><img alt=\"D1\" src=a.png></code>"),
        ("<!-- a --!><img src=a.png>", "<!-- a --!><img alt=\"D1\" src=a.png>"),
        ("a < b <img src=a.png", "a < b <img src=a.png"),
    ] {
        assert_eq!(html(before), after);
    }
}

#[test]
fn other_images_of_html_are_left_alone() {
    for text in [
        "<img src=a.png alt>",
        "<img alt='' src=a.png>",
        "<img alt=\"a cup\" src=a.png>",
        "<img ALT = cup src=a.png>",
        "<img src=a.png role=presentation>",
        "<img src=a.png aria-hidden=true>",
        "<img src=a.png aria-label='a cup'>",
        "<!-- <img src=a.png> -->",
        "<!--><!-- <img src=a.png> -->",
        "<script>document.write('<img src=a.png>')</script>",
        "<script><!-- <script> <img src=a.png> </script> --></script>",
        "<style>/* <img src=a.png> */</style>",
        "<textarea><img src=a.png></textarea>",
        "<title><img src=a.png></title>",
        "<template><div><img src=a.png></div></template>",
        "<pre><code><img src=a.png></code></pre>",
        "<pre>&lt;img src=a.png></pre>",
        "<imgage src=a.png>",
        "<p title='<img src=a.png>'>",
        "<iframe><img src=a.png></iframe>",
    ] {
        assert_eq!(html(text), text);
    }
}

#[test]
fn descriptions_that_are_there_can_be_replaced() {
    let both = Choice { decorative: true, given: true };
    for (before, after) in [
        ("<img src=a.png alt>", "<img src=a.png alt=\"D1\">"),
        ("<img src=a.png alt/>", "<img src=a.png alt=\"D1\"/>"),
        ("<img\nalt=''\nsrc=a.png>", "<img alt=\"D1\"\nsrc=a.png>"),
        ("<img data-alt=a ALT = \"a > cup\" src=a.png>", "<img data-alt=a alt=\"D1\" src=a.png>"),
        ("<img src='x'alt=cup>", "<img src='x' alt=\"D1\">"),
        ("<img src=a.png alt=cup>", "<img src=a.png alt=\"D1\">"),
        ("<img alt=cup alt=glass>", "<img alt=\"D1\" alt=glass>"),
        ("<img title=\"alt=''\" alt=''>", "<img title=\"alt=''\" alt=\"D1\">"),
        ("<img aria-hidden=true src=a.png>", "<img alt=\"D1\" aria-hidden=true src=a.png>"),
    ] {
        assert_eq!(filled(Format::Html, before, both), after);
    }
    let decorative = Choice { decorative: true, given: false };
    assert_eq!(filled(Format::Html, "<img alt=cup><img alt=''>", decorative), "<img alt=cup><img alt=\"D1\">");
    for (before, after) in [
        ("![a *cup*](a.png)", "![D1](a.png)"),
        ("![](a.png)", "![D1](a.png)"),
        ("> <img alt=''\n> src=a.png>", "> <img alt=\"D1\"\n> src=a.png>"),
    ] {
        assert_eq!(filled(Format::Markdown, before, both), after);
    }
    // Where the description ends is not known, or it is the name of the address.
    for text in ["![a [cup] of tea](a.png)", "![cup]\n\n[cup]: a.png"] {
        assert_eq!(filled(Format::Markdown, text, both), text);
    }
}

#[test]
fn images_of_markdown_without_a_description_get_one() {
    for (before, after) in [
        ("![](a.png)", "![D1](a.png)"),
        (
            "# A\r\n\r\nü ![](a.png) and ![]( <b c.png> \"title\")\r\n",
            "# A\r\n\r\nü ![D1](a.png) and ![D2]( <b c.png> \"title\")\r\n",
        ),
        ("![][cup]\n\n[cup]: a.png", "![D1][cup]\n\n[cup]: a.png"),
        ("[![](a.png)](page.html)", "[![D1](a.png)](page.html)"),
        ("> - ![](a.png)\n>   ![](b.png)", "> - ![D1](a.png)\n>   ![D2](b.png)"),
        (
            "| a | b |\n|---|---|\n| ![](a.png) | <img src=b.png> |",
            "| a | b |\n|---|---|\n| ![D1](a.png) | <img alt=\"D2\" src=b.png> |",
        ),
        ("text <img src=a.png> text", "text <img alt=\"D1\" src=a.png> text"),
        (
            "<p align=center>\n<img src=a.png\nwidth=3>\n</p>",
            "<p align=center>\n<img alt=\"D1\" src=a.png\nwidth=3>\n</p>",
        ),
        ("> <p>\n> <img\n> src=a.png>\n> </p>", "> <p>\n> <img alt=\"D1\"\n> src=a.png>\n> </p>"),
        ("a <img\nsrc=a.png> b ![](b.png)", "a <img alt=\"D1\"\nsrc=a.png> b ![D2](b.png)"),
        ("> a <img\n> src=a.png> b", "> a <img alt=\"D1\"\n> src=a.png> b"),
        ("<div>\n\n![](a.png)\n\n</div>", "<div>\n\n![D1](a.png)\n\n</div>"),
    ] {
        assert_eq!(markdown(before), after);
    }
}

#[test]
fn other_images_of_markdown_are_left_alone() {
    for text in [
        "![a cup](a.png)",
        "![`cup`](a.png)",
        "![![cup](b.png)](a.png)",
        "`![](a.png)`",
        "```\n![](a.png)\n<img src=a.png>\n```",
        "~~~html\n<img src=a.png>\n~~~",
        "    ![](a.png)",
        "\\![](a.png)",
        "!\\[](a.png)",
        "[](a.png)",
        "![]",
        "![][nowhere]",
        "<!-- ![](a.png) <img src=a.png> -->",
        "<pre>\n<img src=a.png>\n</pre>",
        "<code><img src=a.png></code>",
        "<script>\n'<img src=a.png>'\n</script>",
        "---\nimage: ![](a.png)\n---\n",
        "$![](a.png)$",
        "<img src=a.png alt=''>",
    ] {
        assert_eq!(markdown(text), text);
    }
}

#[test]
fn addresses_and_lines_are_those_of_the_document() {
    let page = "<base href='img/'>\n<img src=' a.png '>\n\n<img srcset='b.png 2x, c.png'><img src='' srcset=d.png>\n<img alt=e>";
    assert_eq!(
        sources(Format::Html, page),
        [
            (2, " a.png ".to_owned(), Alt::Missing),
            (4, "b.png".to_owned(), Alt::Missing),
            (4, "d.png".to_owned(), Alt::Missing),
            (5, String::new(), Alt::Given),
        ]
    );
    let text = "![](a.png)\n\n<p>\n<img src='b&amp;c.png' alt=''></p>\n\n![d][e]\n\n[e]: <f g.png>\n";
    assert_eq!(
        sources(Format::Markdown, text),
        [
            (1, "a.png".to_owned(), Alt::Missing),
            (4, "b&c.png".to_owned(), Alt::Decorative),
            (6, "f g.png".to_owned(), Alt::Given),
        ]
    );
}

#[test]
fn what_is_written_is_read_back() {
    const TEXT: &str = "\"A\" <b> & [c] *d* _e_ `f` | \\ $g$ ~h~ für";
    let written = |format, before: &str, text: &str| {
        let document = Document::read(format, before.as_bytes().to_vec()).unwrap();
        String::from_utf8(document.with(&[(0, text.to_owned())]).content).unwrap()
    };
    let html = written(Format::Html, "<meta charset=UTF-8><img src=a>", TEXT);
    assert!(html.contains("alt=\"&quot;A&quot; &lt;b&gt; &amp; [c] *d* _e_ `f` | \\ $g$ ~h~ für\""), "{html}");
    // A page of which it is not known that it has such letters.
    assert!(written(Format::Html, "<img src=a>", "für").contains("alt=\"f&#252;r\""));

    let markdown = written(Format::Markdown, "| a |\n|---|\n| ![](a.png) |\n", TEXT);
    let mut read = String::new();
    // All that may begin something, but for quotation marks, which would only be made typographic.
    let options = pulldown_cmark::Options::all() - pulldown_cmark::Options::ENABLE_SMART_PUNCTUATION;
    for event in pulldown_cmark::Parser::new_ext(&markdown, options) {
        if let pulldown_cmark::Event::Text(text) = event {
            read.push_str(&text);
        }
    }
    // The heading of the table, then the description.
    assert_eq!(read.strip_prefix('a'), Some(TEXT), "{markdown}");
}

#[test]
fn other_encodings_are_kept_or_refused() {
    let page = b"<p>f\xfcr</p><img src=a.png>".to_vec();
    let document = Document::read(Format::Html, page).unwrap();
    assert_eq!(document.with(&[(0, "für".to_owned())]).content, b"<p>f\xfcr</p><img alt=\"f&#252;r\" src=a.png>");
    let refused = Document::read(Format::Markdown, b"f\xfcr".to_vec()).unwrap_err().to_string();
    assert!(refused.contains("expected UTF-8"), "{refused}");
    let refused = Document::read(Format::Html, b"\xff\xfe<\0".to_vec()).unwrap_err().to_string();
    assert!(refused.contains("UTF-16"), "{refused}");
    assert!(Document::read(Format::Html, Vec::new()).unwrap().images().is_empty());
}

/// Names a picture by its width; those of width 3 are not sure, of width 4 without a word.
fn describe(pictures: &[Picture]) -> Result<Vec<Written>, std::convert::Infallible> {
    let of = |picture: &Picture| match picture.width() {
        3 => Written { text: "something".to_owned(), score: -3.0 },
        4 => Written { text: ". ,".to_owned(), score: -0.1 },
        width => Written { text: format!("a picture {width} wide"), score: -0.1 },
    };
    Ok(pictures.iter().map(of).collect())
}

fn png(width: u32) -> Vec<u8> {
    Picture::blank(width, 2, [width as u8, 0, 0]).to_png().unwrap()
}

#[test]
fn documents_are_filled_in() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    };
    (1..=4).for_each(|width| drop(file(&format!("img/{width}.png"), &png(width))));
    file("img/one again.png", &png(1));
    file("img/broken.png", b"no picture");
    file("img/drawing.svg", b"<?xml version='1.0'?><svg/>");
    let inline = {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(png(2))
    };
    let page = format!(
        "<img src=img/1.png>\n<img src='img/one%20again.png?x'>\n<img src=img/3.png>\n<img src=img/4.png>\n\
         <img src=https://example.org/a.png>\n<img src=img/none.png>\n<img src=img/broken.png>\n<img src=img/drawing.svg>\n\
         <img src='data:image/png;base64,{inline}'>\n<img src=/img/2.png>\n<img>"
    );
    let note = "![](../img/2.png) ![done](../img/1.png)";
    let paths: [PathBuf; 2] = [file("page.html", page.as_bytes()), file("notes/note.md", note.as_bytes())];
    let [html, markdown] = [
        Document::read(Format::Html, page.clone().into_bytes()).unwrap(),
        Document::read(Format::Markdown, note.as_bytes().to_vec()).unwrap(),
    ];
    let page_of = |path, document| Page { path, document, root: Some(dir.path()) };
    let documents = [page_of(paths[0].as_path(), &html), page_of(paths[1].as_path(), &markdown)];
    let mut asked = 0;
    let mut ask = |pictures: &[Picture]| {
        asked += pictures.len();
        describe(pictures)
    };
    let mut describer = Describer::new(Phrasing::default(), 0.5);
    let mut at = (0, 0);
    let mut filed = Vec::new();
    let mut file = |number, edited: &Edited, is_done| {
        filed.push((number, edited.clone(), is_done));
        Ok(())
    };
    let choice = Choice::default();
    let filled =
        fill_in(&documents, choice, &mut describer, &mut ask, &mut file, &mut |done, of| at = (done, of)).unwrap();
    assert_eq!(filed, [(0, filled[0].1.clone(), true), (1, filled[1].1.clone(), true)]);
    // Pictures 1 to 4; equal ones once.
    assert_eq!((asked, describer.pictures(), at), (4, 4, (12, 12)));
    let (reports, edited) = &filled[0];
    let outcomes: Vec<&Outcome> = reports.iter().map(|report| &report.outcome).collect();
    assert_eq!(outcomes[0].text(), Some("A picture 1 wide."));
    assert_eq!(outcomes[1], outcomes[0]);
    assert!(matches!(outcomes[2], Outcome::Unsure(described) if described.confidence < 0.1));
    assert_eq!(*outcomes[3], Outcome::Wordless);
    assert_eq!(*outcomes[4], Outcome::Remote);
    for (number, part) in [(5, "none.png"), (6, "broken.png"), (10, "found none")] {
        assert!(
            matches!(outcomes[number], Outcome::Broken { problem } if problem.contains(part)),
            "{:?}",
            outcomes[number]
        );
    }
    assert!(matches!(outcomes[7], Outcome::Unsupported { problem } if problem.contains("SVG")), "{:?}", outcomes[7]);
    assert_eq!(outcomes[8].text(), Some("A picture 2 wide."));
    assert_eq!(outcomes[9].text(), Some("A picture 2 wide."));
    let text = String::from_utf8(edited.content.clone()).unwrap();
    assert_eq!(text.matches("alt=").count(), 4);
    assert!(text.starts_with("<img alt=\"A picture 1 wide.\" src=img/1.png>\n"), "{text}");
    assert_eq!(edited.undone(), page.as_bytes());

    let (reports, edited) = &filled[1];
    let Report { line, source, .. } = &reports[0];
    assert_eq!((reports.len(), *line, source.as_deref()), (1, 1, Some("../img/2.png")));
    assert_eq!(edited.content, b"![A picture 2 wide.](../img/2.png) ![done](../img/1.png)");
    let json = serde_json::to_value(&reports[0]).unwrap();
    assert_eq!((&json["outcome"], &json["text"]), (&"described".into(), &"A picture 2 wide.".into()));

    let files: Vec<PathBuf> = xvlm::alt::files_of(dir.path()).unwrap();
    let pictures: Vec<&PathBuf> = files.iter().filter(|file| is_picture(file)).collect();
    assert_eq!(pictures.len(), 6, "{pictures:?}");
    assert!(xvlm::alt::files_of(Path::new("none/at/all")).is_err());
}

/// Pieces that documents are made of, in any order: they open and close what the others are in.
const PIECES: &[&str] = &[
    "<img src=a.png>",
    "<img src='b.png'\n",
    "<img alt='' src=a>",
    "<img alt=\"c\">",
    "![](a.png)",
    "![ ](b.png)",
    "![c](d.png)",
    "![][r]",
    "[r]: e.png\n",
    "\n",
    "\r\n",
    "\n\n",
    "> ",
    "- ",
    "    ",
    "```\n",
    "~~~",
    "`",
    "<!--",
    "-->",
    "<pre>",
    "</pre>",
    "<code>",
    "</code>",
    "<script>",
    "</script>",
    "<template>",
    "</template>",
    "<p>",
    "</p>",
    "<div>\n",
    "</div>\n\n",
    ">",
    "<",
    "\"",
    "'",
    "ü",
    "𝄞",
    "\\",
    "[",
    "]",
    "(",
    ")",
    "!",
    "| a | b |\n|---|---|\n",
    "|",
    "text ",
    "&amp;",
    "<base href=x/>",
    "\t",
    "\0",
    "---\n",
    "$",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn nothing_but_descriptions_is_written(
        pieces in prop::collection::vec(prop::sample::select(PIECES), 0..24),
        is_html in any::<bool>(),
        decorative in any::<bool>(),
        given in any::<bool>(),
    ) {
        let text = pieces.concat();
        let format = if is_html { Format::Html } else { Format::Markdown };
        let choice = Choice { decorative, given };
        let document = Document::read(format, text.clone().into_bytes()).unwrap();
        let chosen = document.chosen(choice);
        let texts: Vec<(usize, String)> = chosen.iter().map(|&image| (image, format!("Text {image}."))).collect();
        let edited = document.with(&texts);
        prop_assert_eq!(edited.undone(), text.as_bytes());
        let placed = chosen.iter().filter(|&&image| document.has_place(image)).count();
        prop_assert_eq!(edited.changes.len(), placed);
        // The images are the same as before, and those that got a description have it.
        let read = Document::read(format, edited.content.clone()).unwrap();
        prop_assert_eq!(read.images().len(), document.images().len(), "{:?}", String::from_utf8_lossy(&edited.content));
        for (number, (before, after)) in document.images().iter().zip(read.images()).enumerate() {
            prop_assert_eq!((&before.source, before.line), (&after.source, after.line));
            let got = chosen.contains(&number) && document.has_place(number);
            let expected = if got { Alt::Given } else { before.alt };
            prop_assert_eq!(after.alt, expected, "image {} of {:?}", number, String::from_utf8_lossy(&edited.content));
        }
        // A second time there is nothing to do.
        if !given {
            let left = read.chosen(choice).into_iter().filter(|&image| read.has_place(image)).count();
            prop_assert_eq!(left, 0);
        }
    }

    #[test]
    fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for format in [Format::Html, Format::Markdown] {
            if let Ok(document) = Document::read(format, bytes.clone()) {
                prop_assert_eq!(document.with(&[]).content, bytes.clone());
            }
        }
    }
}

#[test]
fn what_is_interrupted_goes_on_from_what_was_filed() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |width: u32| {
        let png = Picture::from_rgb(width, 2, vec![0; 6 * width as usize]).unwrap().to_png().unwrap();
        fs::write(dir.path().join(format!("{width}.png")), png).unwrap();
        format!("<img src={width}.png>\n")
    };
    // A page of more images than are described at a time, and two that come after it.
    let pages = [1..50, 50..52, 52..52].map(|widths| widths.map(picture).collect::<String>());
    let run = |contents: &mut [String], fails_after: usize, asked: &mut usize| {
        let read = |content: &String| Document::read(Format::Html, content.clone().into_bytes()).unwrap();
        let documents: Vec<Document> = contents.iter().map(read).collect();
        let path = dir.path().join("page.html");
        let pages = documents.iter().map(|document| Page { path: &path, document, root: None });
        let mut describe = |pictures: &[Picture]| match *asked >= fails_after {
            true => Err("stopped"),
            false => {
                *asked += pictures.len();
                let text = |picture: &Picture| format!("a picture {} wide", picture.width());
                Ok(pictures.iter().map(|picture| Written { text: text(picture), score: 0.0 }).collect())
            }
        };
        let mut file = |number: usize, edited: &Edited, _| {
            contents[number] = String::from_utf8(edited.content.clone()).unwrap();
            Ok(())
        };
        let (pages, mut describer) = (pages.collect::<Vec<_>>(), Describer::new(Phrasing::default(), 0.0));
        let choice = Choice::default();
        fill_in(&pages, choice, &mut describer, &mut describe, &mut file, &mut |_, _| {}).map(|_| ())
    };
    let (mut whole, mut parts) = (pages.clone(), pages);
    run(&mut whole, usize::MAX, &mut 0).unwrap();
    let mut asked = 0;
    assert_eq!(run(&mut parts, 40, &mut asked), Err("stopped"));
    assert_eq!((asked, parts[0].matches("alt=").count(), parts[1].matches("alt=").count()), (40, 40, 0));
    asked = 0;
    run(&mut parts, usize::MAX, &mut asked).unwrap();
    assert_eq!((asked, &parts), (51 - 40, &whole));
}
