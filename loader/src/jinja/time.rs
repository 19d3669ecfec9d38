//! `strftime_now`: the clock as a text, in English and UTC.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment as a calendar has it.
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 0.
    day_of_year: u64,
    /// 0 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    fn of(unix_seconds: u64) -> Moment {
        let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
        // The Gregorian calendar repeats itself every 400 years; counted from March 1st its leap days come last.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * from_march + 2) / 153;
        let day = from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12;
        let year = year_of_era + era * 400 + u64::from(month < 2);
        let leap =
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let month = usize::try_from(month).unwrap_or(0) % 12;
        Moment {
            year,
            month,
            day,
            day_of_year: before[month] + u64::from(leap && month > 1) + day - 1,
            weekday: (days + 4) % 7,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    /// The week's year and number by ISO 8601.
    fn iso_week(&self) -> (u64, u64) {
        let weekday = (self.weekday + 6) % 7;
        let week = (self.day_of_year + 10 - (weekday + 1)) / 7;
        let weeks = |year: u64| {
            let ends = |year: u64| (year + year / 4 - year / 100 + year / 400) % 7;
            52 + u64::from(ends(year) == 4 || ends(year - 1) == 3)
        };
        match week {
            0 => (self.year - 1, weeks(self.year - 1)),
            week if week > weeks(self.year) => (self.year + 1, 1),
            week => (self.year, week),
        }
    }
}

/// The moment as a format says, for the conversions that a C library has; `%-d` and the like are without padding.
pub(crate) fn strftime(format: &str, unix_seconds: u64) -> Result<String, String> {
    let now = Moment::of(unix_seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut conversion = chars.next();
        let plain = conversion == Some('-');
        if plain {
            conversion = chars.next();
        }
        let part = convert(&now, conversion, unix_seconds).ok_or_else(|| {
            format!("strftime_now: conversion %{} is not supported", conversion.unwrap_or(' '))
        })?;
        match plain {
            true => {
                let bare = part.trim_start_matches(['0', ' ']);
                out += if bare.is_empty() { "0" } else { bare };
            }
            false => out += &part,
        }
    }
    Ok(out)
}

fn convert(now: &Moment, conversion: Option<char>, unix_seconds: u64) -> Option<String> {
    let two = |n: u64| format!("{n:02}");
    let weekday = DAYS[usize::try_from(now.weekday).unwrap_or(0) % 7];
    let month = MONTHS[now.month];
    let hour12 = if now.hour.is_multiple_of(12) { 12 } else { now.hour % 12 };
    let all = |formats: &[char]| {
        let parts = formats.iter().map(|c| match c {
            'A'..='Z' | 'a'..='z' => convert(now, Some(*c), unix_seconds),
            c => Some(c.to_string()),
        });
        parts.collect::<Option<String>>()
    };
    Some(match conversion? {
        'Y' => now.year.to_string(),
        'C' => two(now.year / 100),
        'y' => two(now.year % 100),
        'm' => two(now.month as u64 + 1),
        'd' => two(now.day),
        'e' => format!("{:2}", now.day),
        'j' => format!("{:03}", now.day_of_year + 1),
        'B' => month.into(),
        'b' | 'h' => month.get(..3)?.into(),
        'A' => weekday.into(),
        'a' => weekday.get(..3)?.into(),
        'H' => two(now.hour),
        'k' => format!("{:2}", now.hour),
        'I' => two(hour12),
        'l' => format!("{hour12:2}"),
        'M' => two(now.minute),
        'S' => two(now.second),
        'f' => "000000".into(),
        'p' => if now.hour < 12 { "AM" } else { "PM" }.into(),
        'u' => (if now.weekday == 0 { 7 } else { now.weekday }).to_string(),
        'w' => now.weekday.to_string(),
        'U' => two((now.day_of_year + 7 - now.weekday) / 7),
        'W' => two((now.day_of_year + 7 - (now.weekday + 6) % 7) / 7),
        'V' => two(now.iso_week().1),
        'G' => now.iso_week().0.to_string(),
        's' => unix_seconds.to_string(),
        // Python's clock without a zone has no name for one.
        'z' | 'Z' => String::new(),
        'n' => "\n".into(),
        't' => "\t".into(),
        '%' => "%".into(),
        'D' | 'x' => all(&['m', '/', 'd', '/', 'y'])?,
        'F' => all(&['Y', '-', 'm', '-', 'd'])?,
        'T' | 'X' => all(&['H', ':', 'M', ':', 'S'])?,
        'R' => all(&['H', ':', 'M'])?,
        'r' => all(&['I', ':', 'M', ':', 'S', ' ', 'p'])?,
        'c' => all(&['a', ' ', 'b', ' ', 'e', ' ', 'H', ':', 'M', ':', 'S', ' ', 'Y'])?,
        _ => return None,
    })
}
