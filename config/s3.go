package config

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

// Bounds of S3.MultipartAbove: what a part and a single put can hold.
const (
	multipartMin = 5 * MiB
	multipartMax = 5 * GiB
)

func checkS3(col *collector, key string, s S3) {
	if s.Bucket == "" {
		col.addMissing(key+".bucket", "the bucket is missing")
	} else if len(s.Bucket) < 3 || len(s.Bucket) > 63 || strings.Trim(s.Bucket, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		col.add(Problem{Key: key + ".bucket", Value: s.Bucket, Msg: fmt.Sprintf("%q is no bucket name: 3 to 63 of a-z 0-9 . -", s.Bucket)})
	}
	checkPlace(col, key, s.Endpoint, s.Prefix, s.CAFile)
	if u, err := url.Parse(s.Endpoint); err == nil && strings.Trim(u.Path, "/") != "" {
		col.add(Problem{Key: key + ".endpoint", Msg: "must have no path"})
	}
	switch {
	case (s.AccessKeyID == "") != (s.SecretAccessKey == ""):
		col.add(Problem{Key: key, Msg: "access_key_id and secret_access_key need each other"})
	case s.SessionToken != "" && s.AccessKeyID == "":
		col.add(Problem{Key: key + ".session_token", Msg: "needs access_key_id"})
	case s.AccessKeyID != "" && s.CredentialsFile != "":
		col.add(Problem{Key: key + ".credentials_file", Msg: "access_key_id is set as well; only one of them can be right"})
	case s.AccessKeyID != "" && (s.ConfigFile != "" || s.Profile != ""):
		col.add(Problem{Key: key, Msg: "access_key_id is set as well as a profile; only one of them can be right"})
	case s.ConfigFile != "" && !filepath.IsAbs(s.ConfigFile):
		checkAbs(col, key+".config_file", s.ConfigFile)
	case s.CredentialsFile != "" && !filepath.IsAbs(s.CredentialsFile):
		checkAbs(col, key+".credentials_file", s.CredentialsFile)
	default:
		if _, err := s.Credentials(); err != nil {
			col.add(Problem{Key: key + ".credentials_file", Value: s.CredentialsFile, Msg: err.Error()})
		}
	}
	checkRole(col, key, s)
	checkObjects(col, key, s)
}

// checkObjects checks how objects are made.
func checkObjects(col *collector, key string, s S3) {
	oneOf := func(key, value string, allowed ...string) {
		if value != "" && !slices.Contains(allowed, value) {
			col.add(Problem{Key: key, Value: value, Msg: fmt.Sprintf("%q is none of %s", value, strings.Join(allowed, ", "))})
		}
	}
	if n := s.MultipartAbove; n != 0 && (n < multipartMin || n > multipartMax) {
		col.add(Problem{Key: key + ".multipart_above", Value: n.String(), Msg: fmt.Sprintf("must be from %v to %v", multipartMin, multipartMax)})
	}
	if s.StorageClass == "GLACIER" || s.StorageClass == "DEEP_ARCHIVE" {
		col.add(Problem{Key: key + ".storage_class", Value: s.StorageClass, Msg: "is an archive, from which nothing can be read at once"})
	}
	oneOf(key+".sse", s.SSE, "AES256", "aws:kms", "aws:kms:dsse")
	if s.KMSKeyID != "" && !strings.HasPrefix(s.SSE, "aws:kms") {
		col.add(Problem{Key: key + ".sse_kms_key_id", Msg: "needs sse: aws:kms or aws:kms:dsse"})
	}
	oneOf(key+".checksum", s.Checksum, "crc32c", "md5", "none")
}

func checkRole(col *collector, key string, s S3) {
	switch {
	case s.RoleARN == "" && (s.ExternalID != "" || s.RoleSessionName != "" || s.STSEndpoint != ""):
		col.add(Problem{Key: key, Msg: "external_id, role_session_name and sts_endpoint need role_arn"})
	case s.RoleARN != "" && !strings.HasPrefix(s.RoleARN, "arn:"):
		col.add(Problem{Key: key + ".role_arn", Value: s.RoleARN, Msg: fmt.Sprintf("%q does not begin with arn:", s.RoleARN)})
	}
	checkEndpoint(col, key+".sts_endpoint", s.STSEndpoint)
}
