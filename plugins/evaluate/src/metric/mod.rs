//! The metrics by name: which output types they fit, how one sample is scored, how samples add up.

pub(crate) mod bleu;
pub(crate) mod chrf;
pub(crate) mod rouge;
mod statistic;
pub(crate) mod text;

pub(crate) use statistic::{Sample, Statistic, Totals};

use regex::Regex;

use crate::tasks::OutputType;

/// A metric. Names and definitions are those of lm-evaluation-harness; `f1_macro`,
/// `token_perplexity`, `rouge*` and `f1` of generated text are additions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Choice with the highest log-likelihood is right; or greedy decoding gives the target.
    Acc,
    /// The same with log-likelihoods divided by the characters of the choice.
    AccNorm,
    /// … by its bytes in UTF-8.
    AccBytes,
    /// Text equals the target; in a multiple choice, greedy decoding gives the right choice.
    ExactMatch,
    /// F1 of two classes, the second being the positive one.
    F1,
    /// Mean F1 over the classes that occur.
    F1Macro,
    /// Matthews correlation coefficient.
    Mcc,
    /// Squared distance of the choices' softmax from the truth.
    BrierScore,
    /// exp(−mean log-likelihood of the targets).
    Perplexity,
    /// exp(−Σ log-likelihood / Σ tokens).
    TokenPerplexity,
    /// … / Σ words.
    WordPerplexity,
    /// … / Σ bytes.
    BytePerplexity,
    /// −Σ log-likelihood / Σ bytes / ln 2.
    BitsPerByte,
    /// Overlap of words with the target, as SQuAD defines it.
    TokenF1,
    /// Overlap of words.
    Rouge1,
    /// Overlap of word pairs.
    Rouge2,
    /// Longest common subsequence of words.
    RougeL,
    /// Corpus BLEU as sacreBLEU computes it.
    Bleu,
    /// Corpus chrF2 as sacreBLEU computes it.
    Chrf,
}

/// Options of `exact_match`.
#[derive(Debug, Clone, Default)]
pub(crate) struct MetricOptions {
    pub(crate) ignore_case: bool,
    pub(crate) ignore_punctuation: bool,
    pub(crate) ignore_numbers: bool,
    pub(crate) regexes_to_ignore: Vec<Regex>,
}

use Metric::*;

/// Metric, name, output types it fits, statistic.
const ALL: [(Metric, &str, &[OutputType], Statistic); 19] = {
    use OutputType::{Generate, LogLikelihood, MultipleChoice, Rolling};
    [
        (Acc, "acc", &[MultipleChoice, LogLikelihood], Statistic::Mean),
        (AccNorm, "acc_norm", &[MultipleChoice], Statistic::Mean),
        (AccBytes, "acc_bytes", &[MultipleChoice], Statistic::Mean),
        (ExactMatch, "exact_match", &[Generate, MultipleChoice], Statistic::Mean),
        (F1, "f1", &[MultipleChoice], Statistic::F1),
        (F1Macro, "f1_macro", &[MultipleChoice], Statistic::F1Macro),
        (Mcc, "mcc", &[MultipleChoice], Statistic::Mcc),
        (BrierScore, "brier_score", &[MultipleChoice], Statistic::Mean),
        (Perplexity, "perplexity", &[LogLikelihood], Statistic::Perplexity),
        (TokenPerplexity, "token_perplexity", &[Rolling], Statistic::WeightedPerplexity),
        (WordPerplexity, "word_perplexity", &[Rolling], Statistic::WeightedPerplexity),
        (BytePerplexity, "byte_perplexity", &[Rolling], Statistic::WeightedPerplexity),
        (BitsPerByte, "bits_per_byte", &[Rolling], Statistic::BitsPerByte),
        (TokenF1, "f1", &[Generate], Statistic::Mean),
        (Rouge1, "rouge1", &[Generate], Statistic::Mean),
        (Rouge2, "rouge2", &[Generate], Statistic::Mean),
        (RougeL, "rougeL", &[Generate], Statistic::Mean),
        (Bleu, "bleu", &[Generate], Statistic::Bleu),
        (Chrf, "chrf", &[Generate], Statistic::Chrf),
    ]
};

impl Metric {
    fn row(self) -> &'static (Metric, &'static str, &'static [OutputType], Statistic) {
        ALL.iter().find(|row| row.0 == self).unwrap_or(&ALL[0])
    }

    /// Its name in files and results.
    pub(crate) fn name(self) -> &'static str {
        self.row().1
    }

    /// How its samples add up.
    pub(crate) fn statistic(self) -> Statistic {
        self.row().3
    }

    /// The harness's word for that.
    pub(crate) fn aggregation(self) -> &'static str {
        match self {
            BrierScore => "brier_score",
            _ => self.statistic().name(),
        }
    }

    /// Whether more is better.
    pub(crate) fn higher_is_better(self) -> bool {
        !matches!(
            self,
            BrierScore
                | Perplexity
                | TokenPerplexity
                | WordPerplexity
                | BytePerplexity
                | BitsPerByte
        )
    }

    /// The metric of a name that fits an output type.
    pub(crate) fn named(name: &str, output_type: OutputType) -> Option<Self> {
        let fits = |row: &&(Metric, &str, &[OutputType], Statistic)| {
            row.1 == name && row.2.contains(&output_type)
        };
        ALL.iter().find(fits).map(|row| row.0)
    }

    /// Whether some output type has a metric of this name.
    pub(crate) fn exists(name: &str) -> bool {
        ALL.iter().any(|row| row.1 == name)
    }

    /// Names of the metrics that fit an output type.
    pub(crate) fn names(output_type: OutputType) -> Vec<&'static str> {
        ALL.iter().filter(|row| row.2.contains(&output_type)).map(|row| row.1).collect()
    }

    /// What the harness computes when a file names none.
    pub(crate) fn defaults(output_type: OutputType) -> &'static [Metric] {
        match output_type {
            OutputType::LogLikelihood => &[Perplexity, Acc],
            OutputType::Rolling => &[WordPerplexity, BytePerplexity, BitsPerByte],
            OutputType::MultipleChoice => &[Acc, AccNorm],
            OutputType::Generate => &[ExactMatch],
        }
    }
}

#[cfg(test)]
mod tests;
