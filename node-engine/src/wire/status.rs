//! Status reports of instances.

use serde::Serialize;
use std::net::IpAddr;

use super::json::{MAX_MESSAGE, Malformed, Members, excerpt, head};
use crate::model::{InstanceId, Status};

/// Longest reason that is told to a cluster.
const MAX_DETAIL: usize = 1024;

#[derive(Serialize)]
struct Job<'a> {
    sname: &'a str,
    status: &'static str,
    status_detail: &'a str,
    instance: u32,
    publicip: String,
}

/// The report of a node to clusters since the second generation. All five members are always there, and the status is one of
/// those a released cluster survives.
pub fn job_report(instance: &InstanceId, status: Status, detail: &str, address: Option<IpAddr>) -> String {
    super::text(&Job {
        sname: instance.service.as_str(),
        status: status.as_str(),
        status_detail: head(detail, MAX_DETAIL),
        instance: instance.number,
        publicip: address.map(|address| address.to_string()).unwrap_or_default(),
    })
}

#[derive(Serialize)]
struct FirstGenerationJob<'a> {
    job_id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ns_ip: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_detail: Option<&'a str>,
}

/// What a first-generation cluster hears of a job: that it is deployed, under which namespace address. The next clusters hear of that
/// elsewhere (`None`), and of details here.
pub fn first_generation_deployed(job: &str, namespace_address: Option<IpAddr>) -> String {
    super::text(&FirstGenerationJob {
        job_id: job,
        status: "DEPLOYED",
        ns_ip: namespace_address,
        status_detail: namespace_address.is_none().then_some(""),
    })
}

/// What a first-generation cluster hears of a job that failed.
pub fn first_generation_failed(job: &str, detail: &str) -> String {
    super::text(&FirstGenerationJob {
        job_id: job,
        status: "FAILED",
        ns_ip: None,
        status_detail: Some(head(detail, MAX_DETAIL)),
    })
}

/// A status report as a cluster reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobReport {
    pub instance: InstanceId,
    pub status: Status,
    pub detail: String,
    pub address: Option<IpAddr>,
}

/// Reads a node's status report.
///
/// # Errors
/// Where a member is missing or the status is none that a node may report.
pub fn read_job_report(bytes: &[u8]) -> Result<JobReport, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let status = members.text("status")?.ok_or(Malformed::Missing("status"))?;
    let status = WORDS.into_iter().find(|known| known.as_str() == status).ok_or_else(|| Malformed::Member {
        member: "status",
        expected: "a status of an instance",
        found: excerpt(status.as_bytes()),
    })?;
    let address = members.said("publicip")?.and_then(|text| text.parse().ok());
    Ok(JobReport {
        instance: instance(&members, "sname", "instance")?,
        status,
        detail: members.text("status_detail")?.unwrap_or_default(),
        address,
    })
}

const WORDS: [Status; 7] = [
    Status::Creating,
    Status::Created,
    Status::Running,
    Status::Failed,
    Status::Dead,
    Status::Completed,
    Status::Undeployed,
];

pub(super) fn instance(
    members: &Members<'_>,
    name: &'static str,
    number: &'static str,
) -> Result<InstanceId, Malformed> {
    let text = members.said(name)?.ok_or(Malformed::Missing(name))?;
    let service = text.parse().map_err(|_| Malformed::Member {
        member: name,
        expected: "a service name",
        found: excerpt(text.as_bytes()),
    })?;
    let wide = members.whole(number)?.ok_or(Malformed::Missing(number))?;
    let number = wide.try_into().map_err(|_| Malformed::Member {
        member: number,
        expected: "an instance number",
        found: wide.to_string(),
    })?;
    Ok(InstanceId { service, number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_have_all_five_members() {
        let instance: InstanceId = "app.default.web.test.instance.0".parse().unwrap();
        let address = Some("192.0.2.11".parse().unwrap());
        let text = job_report(&instance, Status::Created, "", address);
        assert_eq!(
            text,
            r#"{"sname":"app.default.web.test","status":"CREATED","status_detail":"","instance":0,"publicip":"192.0.2.11"}"#
        );
        let text = job_report(&instance, Status::Failed, &"ä".repeat(5000), None);
        let report = read_job_report(text.as_bytes()).unwrap();
        assert_eq!((report.instance, report.status, report.address), (instance, Status::Failed, None));
        assert_eq!(report.detail.len(), MAX_DETAIL);
    }

    #[test]
    fn every_status_reads_back() {
        let instance: InstanceId = "a.b.c.d.instance.3".parse().unwrap();
        for status in WORDS {
            let text = job_report(&instance, status, "because \"so\"\n", None);
            let report = read_job_report(text.as_bytes()).unwrap();
            assert_eq!((report.status, report.detail.as_str()), (status, "because \"so\"\n"));
        }
    }

    #[test]
    fn unknown_words_and_missing_members_are_refused() {
        for text in [
            r#"{"sname":"a.b.c.d","status":"SLEEPING","instance":0}"#,
            r#"{"sname":"a.b.c.d","instance":0}"#,
            r#"{"sname":"a.b.c.d","status":"DEAD"}"#,
            r#"{"sname":"a.b.c.d","status":"DEAD","instance":-1}"#,
            r#"{"sname":"a.b.c.d","status":"DEAD","instance":9999999999}"#,
            r#"{"sname":"a.b","status":"DEAD","instance":0}"#,
            r#"[]"#,
        ] {
            assert!(read_job_report(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn first_generation_reports_name_the_job() {
        assert_eq!(
            first_generation_deployed("60c0", Some("172.18.0.2".parse().unwrap())),
            r#"{"job_id":"60c0","status":"DEPLOYED","ns_ip":"172.18.0.2"}"#
        );
        assert_eq!(
            first_generation_deployed("60c0", None),
            r#"{"job_id":"60c0","status":"DEPLOYED","status_detail":""}"#
        );
        assert_eq!(
            first_generation_failed("60c0", "no image"),
            r#"{"job_id":"60c0","status":"FAILED","status_detail":"no image"}"#
        );
    }
}
