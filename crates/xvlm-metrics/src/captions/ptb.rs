//! Words of a caption, as the COCO caption evaluation separates them: the English tokeniser of Stanford CoreNLP 3.4.1
//! (`PTBTokenizer -preserveLines -lowerCase`, conventions of the Penn Treebank), then without punctuation.
//!
//! That tokeniser is a lexer: at each place the rule that matches most characters wins, the first of equals, and some
//! rules look at what follows. So is this one; its rules are written anew as expressions of `regex-automata`, one of
//! whose automata runs them all at once. What is peculiar is kept: brackets become `-lrb-` and stay (the evaluation's
//! list of punctuation has them in capitals, and tokens are lower-case by then); £ becomes #, and € a $; `cannot` is
//! two words; characters that no rule knows, emoji among them, vanish.
//!
//! In words of the rules, letters and digits are those of Unicode 6.3 within the first 65 536 characters; literal
//! letters match both cases, classes of characters only what they list.

use std::collections::HashMap;
use std::sync::LazyLock;

use rayon::prelude::*;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::util::pool::Pool;
use regex_automata::{Anchored, Input, MatchKind};

use super::CHUNK;

/// Tokens that the evaluation leaves out.
const PUNCTUATION: [&str; 13] = ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"];

/// Parts of rules; a part names earlier ones in braces.
const PARTS: &[(&str, &str)] = &[
    ("space", r"[ \t\u{A0}\u{2000}-\u{200A}\u{3000}]"),
    ("newline", r"\r\n|[\r\n\x0B\x0C\u{85}\u{2028}\u{2029}]"),
    ("gap", r"{space}|{newline}"),
    ("capital", r"[\p{Lu}&&\p{Age:6.3}&&[\x00-\u{FFFF}]]"),
    // Letters of Unicode 6.3: some characters have become letters, or have ceased to be, since.
    (
        "alpha",
        r"[\p{L}\u{1885}\u{1886}&&\p{Age:6.3}&&[\x00-\u{FFFF}]--[\u{19B0}-\u{19C0}\u{19C8}\u{19C9}\u{1CF2}\u{1CF3}]]",
    ),
    ("numeral", r"[\p{Nd}&&\p{Age:6.3}&&[\x00-\u{FFFF}]]"),
    ("digit", r"{numeral}|[\u{7C0}-\u{7C9}]"),
    // Marks and signs of many scripts that stand within words.
    (
        "mark",
        r"[\u{AD}\u{237}-\u{24F}\u{2C2}-\u{2C5}\u{2D2}-\u{2DF}\u{2E5}-\u{36F}\u{370}-\u{37D}\u{384}\u{385}\u{3CF}\u{3F6}\u{3FC}-\u{3FF}\u{483}-\u{487}\u{4CF}\u{4F6}-\u{4FF}\u{510}-\u{525}\u{55A}-\u{55F}\u{591}-\u{5BD}\u{5BF}\u{5C1}\u{5C2}\u{5C4}\u{5C5}\u{5C7}\u{615}-\u{61A}\u{63B}-\u{63F}\u{64B}-\u{65E}\u{670}\u{6D6}-\u{6EF}\u{6FA}-\u{6FF}\u{70F}\u{711}\u{730}-\u{74F}\u{750}-\u{77F}\u{7A6}-\u{7B1}\u{7CA}-\u{7F5}\u{7FA}\u{900}-\u{903}\u{93C}\u{93E}-\u{94E}\u{951}-\u{955}\u{962}\u{963}\u{981}-\u{983}\u{9BC}-\u{9C4}\u{9C7}\u{9C8}\u{9CB}-\u{9CD}\u{9D7}\u{9E2}\u{9E3}\u{A01}-\u{A03}\u{A3C}\u{A3E}-\u{A4F}\u{A81}-\u{A83}\u{ABC}-\u{ACF}\u{B82}\u{BBE}-\u{BC2}\u{BC6}-\u{BC8}\u{BCA}-\u{BCD}\u{C01}-\u{C03}\u{C3E}-\u{C56}\u{D3E}-\u{D44}\u{D46}-\u{D48}\u{E30}-\u{E3A}\u{E47}-\u{E4E}\u{EB1}-\u{EBC}\u{EC8}-\u{ECD}]",
    ),
    ("letter", r"{alpha}|{mark}|&[aeiouAEIOU](?i-u:acute|grave|uml);"),
    ("ampersand", r"(?i-u:&amp;)"),
    // A tag of a markup language.
    ("attribute", r#"[ ]+[A-Za-z][A-Za-z0-9_:.\-]*(?:[ ]*=[ ]*(?:'[^'\n]*'|"[^"\n]*"))?"#),
    (
        "tag",
        r"<(?:[!?][A-Za-z\-][^>\r\n]*|[A-Za-z][A-Za-z0-9_:.\-]*{attribute}*[ ]*/?|/[A-Za-z][A-Za-z0-9_:.\-]*)[ ]*>",
    ),
    ("sentence", r"{gap}(?:{gap}|{capital}|{tag})"),
    ("number", r"{digit}+|{digit}*(?:[.:,\u{AD}\u{66B}\u{66C}]{digit}+)+"),
    ("apostrophe", r"['\u{92}\u{2019}]|(?i-u:&apos;)"),
    ("quote", r"{apostrophe}|[`\u{91}\u{2018}\u{201B}]"),
    ("clitic", r"{apostrophe}(?:[msdMSD]|(?i-u:re|ve|ll))"),
    ("not", r"(?i-u:n){quote}(?i-u:t)"),
    ("word", r"{letter}(?:{letter}|{digit})*(?:[.!?]{letter}(?:{letter}|{digit})*)*"),
    ("hyphen", r"[\-_\u{58A}\u{2010}\u{2011}]"),
    ("alnum", r"{alpha}|{numeral}"),
    ("compound", r"(?:[dDoOlL]{quote}{alnum})?{alnum}+(?:{hyphen}(?:[dDoOlL]{quote}{alnum})?{alnum}+)*"),
    ("joined", r"[A-Z]+(?:(?:[+&]|{ampersand})[A-Z]+)+"),
    ("slashed", r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    ("nation", r"(?i-u:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"),
    ("initials", r"[A-Za-z](?:\.[A-Za-z])*|{nation}"),
    (
        "hyphenated",
        r"[A-Za-z0-9][A-Za-z0-9.,\u{AD}]*(?:-(?:[A-Za-z0-9\u{AD}]+|(?:[A-Za-z](?:\.[A-Za-z])+|{nation})\.))+",
    ),
    // Words that have an apostrophe and stay whole.
    ("elided_first", r"{apostrophe}(?i-u:n){apostrophe}?|[lLdDjJ]{apostrophe}|(?i-u:Dunkin|somethin|ol){apostrophe}"),
    ("elided_start", r"{apostrophe}(?i-u:em|till?|cause)|{apostrophe}[2-9](?i-u:0s)|(?i-u:'twas)"),
    ("elided_name", r"[A-HJ-XZn]{quote}{alpha}{2}{alpha}*|{alpha}{alpha}*[aeiouyAEIOUY]{quote}[aeiouA-Z]{alpha}*"),
    ("elided_rest", r"(?i-u:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)|(?i-u:O){quote}(?i-u:o)"),
    // Addresses. The odd ranges (`,-_` runs from the comma to the underscore) are the tokeniser's own.
    ("url", r#"(?i-u:https?)://[^ \t\n\x0C\r"<>|(){}]+[^ \t\n\x0C\r"<>|.!?(){},\-]"#),
    ("path", r#"/[^ \t\n\x0C\r"<>|()]+[^ \t\n\x0C\r"<>|.!?(){},\-]"#),
    ("www", r#"(?i-u:www)\.(?:[^ \t\n\x0C\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"#),
    ("host", r#"(?:[^ \t\n\x0C\r"`'<>|.!?(){},-_$]+\.)+(?i-u:com|net|org|edu)"#),
    ("mail_name", r#"[a-zA-Z0-9][^ \t\n\x0C\r"<>|()\u{A0}{}]*"#),
    ("mail_host", r#"(?:[^ \t\n\x0C\r"<>|(){}.\u{A0}]+\.)*[^ \t\n\x0C\r"<>|(){}.\u{A0}]+"#),
    ("mail", r"(?:(?i-u:&lt;)|<)?{mail_name}@{mail_host}(?:(?i-u:&gt;)|>)?"),
    ("handle", r"@[a-zA-Z_][a-zA-Z_0-9]*|#{letter}+"),
    // Abbreviations that a lower-case word usually follows,
    ("month", r"(?i-u:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)"),
    ("day", r"(?i-u:Mon|Tue|Tues|Wed|Thu|Thurs|Fri)"),
    (
        "state",
        r"(?i-u:Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt|Wisc?|Wyo)",
    ),
    (
        "state_capital",
        r"A(?i-u:z|rk)|D(?i-u:el)|I(?i-u:ll)|L(?i-u:a)|M(?i-u:ass|iss)|O(?i-u:re)|P(?i-u:a)|T(?i-u:ex)|W(?i-u:ash)",
    ),
    ("company", r"(?i-u:Inc|Cos?|Corp|Pp?t(?-i:[ye])s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys)"),
    ("after_name", r"(?i-u:Jr|Sr|Bros|(?:Ed|Ph)\.D|Blvd|Rd|Esq)"),
    ("measure", r"(?i-u:tel|est|ext|sq|etc|al|seq|Bldg)"),
    ("abbreviation", r"(?:{month}|{day}|{state}|{state_capital}|{company}|{after_name}|{measure})\."),
    // those that a capital usually follows,
    (
        "title",
        r"(?i-u:Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc)|M(?i-u:iss)",
    ),
    (
        "before_name",
        r"{title}|(?i-u:vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|M(?-i:[ft])g|Dept)|{initials}",
    ),
    // and those that only numbers follow.
    ("before_number", r"(?i-u:ca|figs?|prop|nos?|art|bldg|pp|op)\."),
    // What begins a sentence, so that the period before it ends one.
    (
        "opening",
        r"A(?i-u:bout|ccording|dditionally|fter|n|s|t)?|B(?i-u:ut)|E(?i-u:arlier)|H(?i-u:er?|ere|owever)|I(?i-u:f|n|t)|L(?i-u:ast)|M(?i-u:any|ore|r\.|s\.)|N(?i-u:ow)|O(?i-u:nce|ne|ther|ur)|S(?i-u:he|ince|o|ome|uch)|T(?i-u:hat|he|heir|hen|here|hese|hey|his)|W(?i-u:e|hen|hile|hat)|Y(?i-u:et|ou)|{tag}",
    ),
    (
        "extension",
        r"(?i-u:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)",
    ),
    ("file", r"(?:{letter}|{digit})+(?:\.(?:{letter}|{digit})+)*\.{extension}"),
    (
        "phone_dashes",
        r"(?:\([0-9]{2,3}\)[ \u{A0}]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \u{A0}])?[0-9]{2,4}[\- \u{A0}])[0-9]{3,4}[\- \u{A0}]?[0-9]{3,5}",
    ),
    ("phone_dots", r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    ("double", r#""|(?i-u:&quot;)"#),
    ("inner", r"[,;:\u{3001}]"),
    ("face", r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]"),
    (
        "asian_face",
        r"[\^x=~<>]\.\[\^(?i-u:x)=~<>\]|[\-\^x=~<>']_[\-\^x=~<>']|\([\-\^x=~<>'][_.]?[\-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
    ),
    (
        "symbol",
        r"[+%&~\^|\\\u{A6}\u{A7}\u{A8}\u{A9}\u{AC}\u{AE}\u{AF}\u{B0}-\u{BA}\u{D7}\u{F7}\u{387}\u{5BE}\u{5C0}\u{5C3}\u{5C6}\u{5F3}\u{5F4}\u{600}-\u{603}\u{606}-\u{60A}\u{60C}\u{614}\u{61B}\u{61E}\u{66A}\u{66D}\u{703}-\u{70D}\u{7F6}-\u{7F8}\u{964}\u{965}\u{E4F}\u{1FBD}\u{2016}\u{2017}\u{2020}-\u{2023}\u{2030}-\u{2038}\u{203B}\u{203E}-\u{2042}\u{2044}\u{207A}-\u{207F}\u{208A}-\u{208E}\u{2100}-\u{214F}\u{2190}-\u{2BFF}\u{3012}\u{30FB}\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF20}\u{FF3B}-\u{FF40}\u{FF5B}-\u{FF65}]",
    ),
];

/// Which part of what a rule matches is the token; what follows it is only looked at.
#[derive(Clone, Copy)]
enum Token {
    /// All of it.
    Whole,
    /// All but so many characters at the end.
    Less(usize),
    /// The first character.
    First,
    /// What stands before the first space or end of line.
    BeforeGap,
    /// What stands before a clitic: an apostrophe and one or two letters.
    BeforeClitic,
    /// What stands before `n't`.
    BeforeNot,
    /// What ends with the last period.
    ToPeriod,
}

/// What becomes of a token.
#[derive(Clone, Copy)]
enum Form {
    /// As it stands.
    Same,
    /// Nothing: it separates tokens.
    Nothing,
    /// This.
    Text(&'static str),
    /// Without soft hyphens.
    Unhyphenated,
    /// With `&` for `&amp;`.
    Ampersand,
    /// With spaces that do not break.
    OneWord,
    /// The same, and with words for parentheses.
    OneWordBrackets,
    /// Quotation marks as TeX writes them: opening (`true`) or closing, unless the mark itself tells.
    Quotes(bool),
    /// A fraction in ASCII.
    Fraction,
    /// A currency as the Treebank names it.
    Currency,
    /// Three or four hyphens are a dash.
    Hyphens,
    /// An abbreviation whose period also ends the sentence, and is read again.
    PeriodAgain,
    /// The same, but a single letter leaves the period to the sentence.
    AcronymPeriodAgain,
}

/// Rules: of those that match most, the first counts.
const RULES: &[(&str, Token, Form)] = {
    use Form::*;
    use Token::*;
    &[
        (r"(?i-u:c)\+\+", Whole, Same),
        (r"(?i-u:c|f)#", Whole, Same),
        // Two words written as one.
        (r"(?i-u:cannot|'twas)", Less(3), Same),
        (r"(?i-u:'tis|gonna|gotta|lemme|gimme|wanna)", Less(2), Same),
        (r"{tag}", Whole, OneWord),
        (r"(?i-u:&(?:md|mdash|ndash);)|[\u{96}\u{97}\u{2013}-\u{2015}]", Whole, Text("--")),
        (r"{ampersand}", Whole, Ampersand),
        (r"(?i-u:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)", Whole, Same),
        (r"{word}{clitic}", BeforeClitic, Unhyphenated),
        (r"[A-Za-z\u{AD}]*[A-MO-Za-mo-z]\u{AD}*{not}", BeforeNot, Unhyphenated),
        (r"{word}", Whole, Unhyphenated),
        (r"{elided_first}|{elided_start}|{elided_name}|{elided_rest}", Whole, Same),
        (r"(?i-u:y){apostrophe}{alpha}", Less(1), Same),
        (r"{url}", Whole, Same),
        (r"(?:{www}|{host}){path}?", Whole, Same),
        (r"{mail}", Whole, Same),
        (r"{handle}", Whole, Same),
        (r"(?:{clitic}|{not})[^A-Za-z]", Less(1), Quotes(false)),
        (r"{digit}{1,2}[\-/]{digit}{1,2}[\-/]{digit}{2,4}", Whole, Same),
        (r"[\-+]?{number}", Whole, Unhyphenated),
        (
            r"[\u{207A}\u{207B}\u{208A}\u{208B}]?(?:[\u{2070}\u{B9}\u{B2}\u{B3}\u{2074}-\u{2079}]+|[\u{2080}-\u{2089}]+)",
            Whole,
            Same,
        ),
        (r"(?:{digit}{1,4}[\- \u{A0}])?{digit}{1,4}(?:\\?/|\u{2044}){digit}{1,4}", Whole, OneWord),
        (r"[\u{BC}-\u{BE}\u{2153}-\u{215E}]", Whole, Fraction),
        (
            r"-(?i-u:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i-u:C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls)|(?i-u:Cap){apostrophe}(?i-u:n)|(?i-u:c){apostrophe}(?i-u:est)",
            Whole,
            Ampersand,
        ),
        (r"{slashed}", Whole, Same),
        (r"[A-Z]*\$|#", Whole, Same),
        (
            r"[\u{A2}-\u{A5}\u{80}\u{20A0}\u{20AC}\u{60B}\u{E3F}\u{20A4}\u{FFE0}\u{FFE1}\u{FFE5}\u{FFE6}]",
            Whole,
            Currency,
        ),
        (r"(?:{initials})\.{gap}+(?:{opening}){gap}", BeforeGap, AcronymPeriodAgain),
        (r"{before_number}{gap}?{numeral}", ToPeriod, Same),
        (r"(?:(?i-u:pt)[eyEY]|(?i-u:co))\.{space}(?i-u:ltd|lim)", BeforeGap, Same),
        (r"{abbreviation}{sentence}", BeforeGap, PeriodAgain),
        (r"{abbreviation}(?s:..)", Less(2), Same),
        (r"{abbreviation}", Whole, PeriodAgain),
        (r"(?:{before_name})\.", Whole, Same),
        (r"(?:{before_name}){space}", Less(1), Same),
        (r"(?:{initials}|{apostrophe}[0-9][0-9]){gap}", BeforeGap, Same),
        (r"{file}(?:{gap}|[.?!,])", Less(1), Same),
        (r"{word}\.{inner}", Less(1), Unhyphenated),
        (r"{phone_dashes}|{phone_dots}", Whole, OneWordBrackets),
        (r"{double}[A-Za-z0-9$]", Less(1), Quotes(true)),
        (r"{double}", Whole, Quotes(false)),
        (r"\x7F", Whole, Nothing),
        (r"<|(?i-u:&lt;)", Whole, Text("<")),
        (r">|(?i-u:&gt;)", Whole, Text(">")),
        (r"{face}[^A-Za-z0-9]", Less(1), OneWordBrackets),
        (r"{asian_face}", Whole, OneWordBrackets),
        (r"\{", Whole, Text("-LCB-")),
        (r"\}", Whole, Text("-RCB-")),
        (r"\[", Whole, Text("-LSB-")),
        (r"\]", Whole, Text("-RSB-")),
        (r"\(", Whole, Text("-LRB-")),
        (r"\)", Whole, Text("-RRB-")),
        (r"-+", Whole, Hyphens),
        (r"\.{3,5}|(?:\.[ \u{A0}]){2,4}\.|[\u{85}\u{2026}]", Whole, Text("...")),
        (r"@+|#+|_+", Whole, Same),
        (r"\*+|(?:\\\*){1,3}", Whole, Same),
        (r"{inner}|[?!]+", Whole, Same),
        (r"[.\u{A1}\u{BF}\u{37E}\u{589}\u{61F}\u{6D4}\u{700}-\u{702}\u{7FA}\u{3002}=/]", Whole, Same),
        (r"{hyphenated}\.{inner}", Less(1), Unhyphenated),
        (r"{hyphenated}", Whole, Unhyphenated),
        (r"{compound}\.{inner}", Less(1), Same),
        (r"{compound}", Whole, Same),
        (r"{joined}\.{inner}", Less(1), Ampersand),
        (r"{joined}", Whole, Ampersand),
        (r"'[A-Za-z][^ \t\n\r\u{A0}]", First, Quotes(true)),
        (r"{clitic}|{not}", Whole, Quotes(false)),
        (
            r"{apostrophe}|''|[`\u{2018}\u{2019}\u{201A}-\u{201F}\u{91}-\u{94}\u{2039}\u{203A}\u{AB}\u{BB}]{1,2}",
            Whole,
            Quotes(false),
        ),
        (r"<<|>>", Whole, Same),
        (r"{symbol}", Whole, Same),
        (r"\x00|{space}+|[\u{200B}\u{200E}\u{200F}\u{FEFF}]|{newline}|(?i-u:&nbsp;)", Whole, Nothing),
        // What no rule knows.
        (r"(?s:.)", Whole, Nothing),
    ]
};

type MakeCache = Box<dyn Fn() -> Cache + Send + Sync>;

/// All rules as one automaton, whose states are made as texts need them.
struct Lexer {
    automaton: DFA,
    caches: Pool<Cache, MakeCache>,
}

static LEXER: LazyLock<Lexer> = LazyLock::new(|| {
    let mut parts: HashMap<&str, String> = HashMap::new();
    for (name, pattern) in PARTS {
        let pattern = format!("(?:{})", expand(pattern, &parts));
        parts.insert(name, pattern);
    }
    let rules: Vec<String> = RULES.iter().map(|(pattern, ..)| expand(pattern, &parts)).collect();
    let automaton = DFA::builder()
        .configure(DFA::config().match_kind(MatchKind::All).cache_capacity(16 << 20))
        .thompson(regex_automata::nfa::thompson::Config::new().nfa_size_limit(None))
        .build_many(&rules)
        .expect("the rules are constants, and a test builds them");
    let own = automaton.clone();
    let caches = Pool::new(Box::new(move || own.create_cache()) as MakeCache);
    Lexer { automaton, caches }
});

/// Puts parts in the place of their names.
fn expand(pattern: &str, parts: &HashMap<&str, String>) -> String {
    let mut expanded = String::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('{') {
        expanded.push_str(before);
        let part = after.split_once('}').and_then(|(name, next)| Some((parts.get(name)?, next)));
        match part {
            Some((part, next)) => {
                expanded.push_str(part);
                rest = next;
            }
            None => {
                expanded.push('{');
                rest = after;
            }
        }
    }
    expanded.push_str(rest);
    expanded
}

/// The words of a caption, lower-case and without punctuation, separated by single spaces. (A word may hold a space that
/// does not break, as "1 1/2" does.)
///
/// Line breaks within the caption count as spaces.
pub fn tokenize(caption: &str) -> String {
    // In a file of captions each ends with a line break, which some rules look for.
    let text = format!("{}\n", one_line(caption));
    line(&text, 0, text.len() - 1, &mut LEXER.caches.get())
}

/// The words of captions that are tokenised together, as the evaluation does with all captions of a set: the same as
/// [`tokenize`] of each, but for a few rules that look beyond the end of a caption at the beginning of the next ("vitamin
/// c." before "The …").
pub fn tokenize_all<S: AsRef<str> + Sync>(captions: &[S]) -> Vec<String> {
    let mut text = String::new();
    let mut lines = Vec::with_capacity(captions.len());
    for caption in captions {
        let start = text.len();
        text.push_str(&one_line(caption.as_ref()));
        lines.push((start, text.len()));
        text.push('\n');
    }
    // The file that the evaluation writes does not end with a line break.
    text.pop();
    lines
        .par_chunks(CHUNK)
        .flat_map_iter(|lines| {
            let mut cache = LEXER.caches.get();
            lines.iter().map(|&(start, end)| line(&text, start, end, &mut cache)).collect::<Vec<_>>()
        })
        .collect()
}

fn one_line(caption: &str) -> String {
    caption.replace(['\n', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}'], " ")
}

/// The words of `text` from `start` to `end`.
fn line(text: &str, start: usize, end: usize, cache: &mut Cache) -> String {
    let mut words = String::new();
    let mut at = start;
    while at < end {
        let input = Input::new(text).span(at..text.len()).anchored(Anchored::Yes);
        // No rule asks the automaton to give up, and the last rule matches any character.
        let Ok(Some(found)) = LEXER.automaton.try_search_fwd(cache, &input) else { break };
        let (_, token, form) = RULES[found.pattern().as_usize()];
        let token = token.of(&text[at..found.offset()]);
        let (word, read) = form.of(token);
        at += read.max(1);
        if !word.is_empty() {
            let word = word.to_lowercase();
            if !PUNCTUATION.contains(&word.as_str()) {
                if !words.is_empty() {
                    words.push(' ');
                }
                words.push_str(&word);
            }
        }
    }
    words
}

impl Token {
    fn of(self, matched: &str) -> &str {
        let less = |text: &str, count: usize| text.char_indices().rev().nth(count - 1).map_or(0, |(at, _)| at);
        let end = match self {
            Self::Whole => matched.len(),
            Self::Less(count) => less(matched, count),
            Self::First => matched.chars().next().map_or(0, char::len_utf8),
            Self::BeforeGap => matched.find(char::is_whitespace).unwrap_or(matched.len()),
            Self::BeforeClitic => last_quote(matched),
            Self::BeforeNot => less(&matched[..last_quote(matched)], 1),
            Self::ToPeriod => matched.rfind('.').map_or(matched.len(), |at| at + 1),
        };
        &matched[..end]
    }
}

/// Where the last apostrophe, or what may stand for one, begins.
fn last_quote(text: &str) -> usize {
    let mark = text.rfind(['\'', '\u{92}', '\u{2019}', '`', '\u{91}', '\u{2018}', '\u{201b}']);
    // `&apos;`, whose name is of either case.
    let named = text.rfind('&').filter(|&at| text[at..].to_ascii_lowercase().starts_with("&apos;"));
    mark.max(named).unwrap_or(text.len())
}

impl Form {
    /// The word that a token gives, and how many bytes have been read.
    fn of(self, token: &str) -> (String, usize) {
        let word = match self {
            Self::Same => token.to_owned(),
            Self::Nothing => String::new(),
            Self::Text(text) => text.to_owned(),
            Self::Unhyphenated => {
                let plain = token.replace('\u{ad}', "");
                if plain.is_empty() { "-".to_owned() } else { plain }
            }
            Self::Ampersand => {
                let mut word = token.to_owned();
                while let Some(at) = word.to_ascii_lowercase().find("&amp;") {
                    word.replace_range(at..at + "&amp;".len(), "&");
                }
                word
            }
            Self::OneWord => token.replace(' ', "\u{a0}"),
            Self::OneWordBrackets => token.replace(' ', "\u{a0}").replace('(', "-LRB-").replace(')', "-RRB-"),
            Self::Quotes(opening) => quotes(token, opening),
            Self::Fraction => match token {
                "\u{bc}" => "1/4".to_owned(),
                "\u{bd}" => "1/2".to_owned(),
                "\u{be}" => "3/4".to_owned(),
                "\u{2153}" => "1/3".to_owned(),
                "\u{2154}" => "2/3".to_owned(),
                other => other.to_owned(),
            },
            Self::Currency => match token {
                "\u{a2}" => "cents".to_owned(),
                "\u{a3}" => "#".to_owned(),
                "\u{80}" | "\u{a4}" | "\u{20a0}" | "\u{20ac}" => "$".to_owned(),
                other => other.to_owned(),
            },
            Self::Hyphens => if (3..=4).contains(&token.len()) { "--" } else { token }.to_owned(),
            Self::PeriodAgain => return (token.to_owned(), token.len() - 1),
            Self::AcronymPeriodAgain => {
                let read = token.len() - 1;
                let word = if token.len() == 2 { &token[..read] } else { token };
                return (word.to_owned(), read);
            }
        };
        (word, token.len())
    }
}

fn quotes(token: &str, opening: bool) -> String {
    let (single, double) = if opening { ("`", "``") } else { ("'", "''") };
    let mut word = String::new();
    for c in token.replace("&apos;", "'").replace("&quot;", "\"").chars() {
        match c {
            '\'' => word.push_str(single),
            '"' => word.push_str(double),
            '\u{91}' | '\u{2018}' | '\u{201b}' | '\u{2039}' => word.push('`'),
            '\u{92}' | '\u{2019}' | '\u{203a}' => word.push('\''),
            '\u{93}' | '\u{201c}' | '\u{ab}' => word.push_str("``"),
            '\u{94}' | '\u{201d}' | '\u{bb}' => word.push_str("''"),
            other => word.push(other),
        }
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_used_and_every_rule_is_built() {
        for (at, (name, _)) in PARTS.iter().enumerate() {
            let named = format!("{{{name}}}");
            let is_used = |pattern: &str| pattern.contains(&named);
            assert!(
                PARTS[at + 1..].iter().any(|(_, pattern)| is_used(pattern))
                    || RULES.iter().any(|(pattern, ..)| is_used(pattern)),
                "{name}"
            );
        }
        assert_eq!(LEXER.automaton.pattern_len(), RULES.len());
    }

    #[test]
    fn what_is_odd_about_the_official_words_is_kept() {
        for (caption, expected) in [
            ("A man (in red) can't stop.", "a man -lrb- in red -rrb- ca n't stop"),
            ("You cannot; he's gonna!", "you can not he 's gon na"),
            ("£5, €5 and 5¢", "# 5 $ 5 and 5 cents"),
            ("1 1/2 cups", "1\u{a0}1/2 cups"),
            ("a dog \u{1f415} runs", "a dog runs"),
            ("two\nlines", "two lines"),
            ("...", ""),
            ("", ""),
        ] {
            assert_eq!(tokenize(caption), expected, "{caption:?}");
        }
    }

    #[test]
    fn neighbours_matter_only_together() {
        let captions = ["Vitamin C.", "The end"];
        assert_eq!(tokenize_all(&captions), ["vitamin c", "the end"]);
        assert_eq!(captions.map(tokenize), ["vitamin c.", "the end"]);
        assert_eq!(tokenize_all(&[""; 0]), [""; 0]);
        assert_eq!(tokenize_all(&["", "", "a"]), ["", "", "a"]);
    }

    /// A tag that is not closed, and quotes that are not, end with the caption.
    #[test]
    fn no_word_runs_into_the_next_caption() {
        assert_eq!(tokenize_all(&["<a b='c", "d'>"]), ["< a b = c", "d' >"]);
    }
}
