//! `#[test]` for `testkit::harness`: the function stays as it is, and the harness learns of it.

use proc_macro::{Delimiter, TokenStream, TokenTree};

/// A test of the harness in `testkit`. `#[ignore]` and `#[ignore = "why"]` mean what they mean elsewhere.
#[proc_macro_attribute]
pub fn test(_arguments: TokenStream, item: TokenStream) -> TokenStream {
    let mut function = TokenStream::new();
    let (mut ignored, mut name) = ("::core::option::Option::None".to_owned(), None);
    let mut tokens = item.into_iter().peekable();
    while let Some(token) = tokens.next() {
        // An attribute is `#` and a group in brackets.
        if let (TokenTree::Punct(punct), Some(TokenTree::Group(group))) = (&token, tokens.peek())
            && punct.as_char() == '#'
            && group.delimiter() == Delimiter::Bracket
            && let Some(why) = reason_to_ignore(&group.stream())
        {
            ignored = format!("::core::option::Option::Some({why})");
            tokens.next();
            continue;
        }
        let is_fn = matches!(&token, TokenTree::Ident(word) if word.to_string() == "fn");
        function.extend([token]);
        if is_fn && name.is_none() {
            name = tokens.peek().map(ToString::to_string);
        }
    }
    let Some(name) = name else {
        return "::core::compile_error!(\"#[test] is for functions\");".parse().unwrap();
    };
    let told = format!(
        "::testkit::inventory::submit! {{
            ::testkit::harness::Test {{
                module: ::core::module_path!(),
                name: ::core::stringify!({name}),
                ignored: {ignored},
                run: {name},
            }}
        }}"
    );
    function.extend(told.parse::<TokenStream>().expect("tokens"));
    function
}

/// The reason in an `ignore` attribute: the literal of `ignore = "why"`, an empty one of `ignore`. None of another
/// attribute.
fn reason_to_ignore(attribute: &TokenStream) -> Option<String> {
    let mut tokens = attribute.clone().into_iter();
    let is_ignore = matches!(tokens.next()?, TokenTree::Ident(word) if word.to_string() == "ignore");
    let why = tokens.nth(1).map_or_else(|| "\"\"".to_owned(), |literal| literal.to_string());
    is_ignore.then_some(why)
}
