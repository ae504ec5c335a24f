"""Colours, figures and page parts that inspect, report and datamap share."""
